"""The blocking client: `AsyncClient` in the background loop, with the same surface."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import numpy as np

from splitnet import background
from splitnet.client import AsyncClient
from splitnet.deployment import Deployment, Inputs
from splitnet.generation import Stop, TextModel
from splitnet.security.credentials import AccessLike
from splitnet.tensors import TensorSpec
from splitnet.token_stream import TokenStream

__all__ = ["Client"]


class Client:
    """A client of one deployment; see `AsyncClient` for what the arguments mean and what a break leaves behind.

        with Client("10.0.0.5:7001") as client:
            outputs = client.infer({"pixel_values": array})

    Any number of threads may call at once.
    """

    def __init__(self, address: str, deployment: str = "", *, timeout_s: float = 60.0, credentials: AccessLike | None = None) -> None:
        self._client = AsyncClient(address, deployment, timeout_s=timeout_s, credentials=credentials)

    @property
    def address(self) -> str:
        return self._client.address

    def infer(self, inputs: Inputs, *, timeout_s: float | None = None, retry: bool = False, priority: int = 0) -> dict[str, np.ndarray]:
        """As `AsyncClient.infer`. An interrupt (Ctrl-C) cancels the request on the nodes."""
        return background.run(self._client.infer(inputs, timeout_s=timeout_s, retry=retry, priority=priority))

    def stream(
        self, batches: Iterable[Inputs], *, window: int | None = None, timeout_s: float | None = None, priority: int = 0
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """As `AsyncClient.stream`. `batches` is read in the calling thread, whenever outputs are asked for; where reading blocks,
        outputs that are ready wait for one read at most."""
        width = background.run(self._client.window(window))
        under_way: deque[Future[dict[str, np.ndarray]]] = deque()
        source, index, more = iter(batches), itertools.count(), True
        try:
            while more or under_way:
                if more and len(under_way) < width:
                    try:
                        work = self._client.infer_batch(next(index), next(source), timeout_s=timeout_s, priority=priority)
                    except StopIteration:
                        more = False
                        continue
                    except Exception:  # the caller's own error comes out at its place, too
                        while under_way:
                            yield under_way.popleft().result()
                        raise
                    under_way.append(background.start(work))
                    if not under_way[0].done():
                        continue
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Stop = (),
        *,
        ignore_eos: bool = False,
        timeout_s: float | None = None,
        retry: bool = False,
        priority: int = 0,
    ) -> Generator[int, None, None]:
        """As `AsyncClient.generate`: `for token in client.generate(ids, max_new_tokens=64)`. Closing the iterator, or an interrupt, ends it on the nodes."""
        stream = self._client.generate(
            input_ids, max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, stop,
            ignore_eos=ignore_eos, timeout_s=timeout_s, retry=retry, priority=priority,
        )  # fmt: skip
        return _tokens(stream)

    def describe(self) -> Deployment:
        """As `AsyncClient.describe`."""
        return background.run(self._client.describe())

    def connect(self) -> None:
        """As `AsyncClient.connect`."""
        background.run(self._client.connect())

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What goes in. Connects if need be."""
        return self._known().inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What comes out. Connects if need be."""
        return self._known().outputs

    @property
    def max_in_flight(self) -> int:
        """How many requests the deployment takes at once, from all its clients. Connects if need be."""
        return self._known().max_in_flight

    @property
    def text(self) -> TextModel | None:
        """What the deployment takes where it is of a decoder model, else None. Connects if need be."""
        return self._known().text

    def close(self) -> None:
        """As `AsyncClient.close`. Idempotent."""
        background.run(self._client.close())

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _known(self) -> AsyncClient:
        self.connect()
        return self._client


def _tokens(stream: TokenStream) -> Generator[int, None, None]:
    try:
        while tokens := background.run(stream.some()):
            yield from tokens
    finally:
        background.run(stream.aclose())

"""From a request to text: the prompt's tokens, the deployment's tokens as they come, and the text that they make."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from splitnet.errors import BadInput
from splitnet.gateway.decoding import StopWatch
from splitnet.gateway.errors import ApiError, invalid
from splitnet.gateway.requests import Wanted
from splitnet.gateway.tokenizing import TextTokenizer
from splitnet.generation import TextModel

__all__ = ["Answer", "Generator", "Piece", "ServedModel", "Tokens"]


class Tokens(Protocol):
    """Token ids as they come. Closing it early ends the generation on the nodes. `splitnet.token_stream.TokenStream` is one."""

    @property
    def finish(self) -> str: ...
    @property
    def cached_tokens(self) -> int: ...
    def __aiter__(self) -> AsyncIterator[int]: ...
    async def aclose(self) -> None: ...


class Generator(Protocol):
    """What the gateway asks of a deployment; `splitnet.AsyncClient` is one."""

    def generate(
        self,
        input_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Tokens: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the answer. `finish` is "stop" or "length" on the last one, else ""."""

    text: str
    finish: str = ""


@dataclass(frozen=True)
class ServedModel:
    """A deployment under the name by which clients ask for it. `created`: seconds since 1970."""

    name: str
    generator: Generator
    limits: TextModel
    tokenizer: TextTokenizer
    created: int

    @property
    def context(self) -> int:
        """Tokens that one session may have, prompt and answer."""
        return min(self.limits.context_length, self.limits.cache_tokens)

    def prompt(self, wanted: Wanted) -> list[int]:
        """The prompt's tokens. Raises ApiError that names the field."""
        field = "messages" if wanted.chat else "prompt"
        if wanted.chat:
            messages = [message for message in wanted.prompt if isinstance(message, dict)]
            try:
                ids = self.tokenizer.encode_chat(messages)
            except BadInput as error:
                raise invalid("messages", error.message + (f" ({error.remedy})" if error.remedy else "")) from None
        elif isinstance(wanted.prompt, str):
            ids = self.tokenizer.encode(wanted.prompt)
        else:
            ids = [token for token in wanted.prompt if isinstance(token, int)]
        if not ids:
            raise invalid(field, f"Invalid '{field}': it is empty, and this model's tokenizer puts nothing before it.")
        if beyond := [token for token in ids if token >= self.limits.vocabulary]:
            raise invalid(field, f"Invalid '{field}': token id {beyond[0]} is not in the vocabulary of {self.limits.vocabulary}.")
        return ids

    def room(self, prompt_tokens: int, wanted: Wanted) -> int:
        """How many tokens the answer may have. Raises ApiError where they do not fit into the context."""
        field = "messages" if wanted.chat else "prompt"
        left = self.context - prompt_tokens
        if left < 1:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.context} tokens, and your {field} resulted in {prompt_tokens} tokens. Please reduce the length of the {field}.",
                param=field,
                code="context_length_exceeded",
            )
        if wanted.max_tokens is not None and wanted.max_tokens > left:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.context} tokens. However, you requested {prompt_tokens + wanted.max_tokens} tokens "
                f"({prompt_tokens} in the {field}, {wanted.max_tokens} in the completion).",
                param="max_completion_tokens" if wanted.chat else "max_tokens",
                code="context_length_exceeded",
            )
        return wanted.max_tokens or left


class Answer:
    """One generation. The counts are right at any time, and whole when the last piece has come."""

    def __init__(self, model: ServedModel, wanted: Wanted, timeout_s: float) -> None:
        self.model = model
        self.wanted = wanted
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self._timeout_s = timeout_s

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The text, in pieces of at least one character, the last of which says why it ended. Raises ApiError for what the request got wrong, and what the
        deployment raises. Leaving it early (`aclose`, or cancelling) ends the generation on the nodes."""
        # Long texts take the tokenizer a while, and it lets other threads run meanwhile.
        prompt = await asyncio.to_thread(self.model.prompt, self.wanted)
        self.prompt_tokens = len(prompt)
        most = self.model.room(len(prompt), self.wanted)
        if self.wanted.echo and (said := self.model.tokenizer.decode(prompt)):
            yield Piece(said)
        async with contextlib.aclosing(self._text(prompt, most)) as pieces:
            async for piece in pieces:
                yield piece

    async def _text(self, prompt: list[int], most: int) -> AsyncGenerator[Piece, None]:
        wanted, ends = self.wanted, self.model.limits.eos_token_ids
        stream, stops = self.model.tokenizer.stream(prompt), StopWatch(wanted.stop)
        tokens = self.model.generator.generate(
            prompt, most, wanted.temperature, wanted.top_p, wanted.top_k, wanted.repetition_penalty, wanted.seed, timeout_s=self._timeout_s
        )
        finish = ""
        try:
            async for token in tokens:
                self.completion_tokens += 1
                if token in ends:
                    finish = "stop"
                    break
                if text := stops.add(stream.add(token)):
                    yield Piece(text)
                if stops.found:
                    break
            self.cached_tokens = tokens.cached_tokens
        finally:
            await tokens.aclose()
        rest = stops.add(stream.end()) + stops.end()
        if not finish:
            finish = "stop" if stops.found or self.completion_tokens < most else "length"
        yield Piece(rest, finish)

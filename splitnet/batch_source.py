"""What `stream` reads its batches from: a plain or an asynchronous iterable."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

from splitnet.deployment import Inputs

__all__ = ["END", "BatchSource"]

END = object()


class BatchSource:
    """Reads a plain or an asynchronous iterable, one item at a time."""

    def __init__(self, batches: Iterable[Inputs] | AsyncIterable[Inputs]) -> None:
        self._later: AsyncIterator[Inputs] | None = None
        self._now: Iterator[Inputs] | None = None
        if isinstance(batches, AsyncIterable):
            self._later = aiter(batches)
        else:
            self._now = iter(batches)

    async def next(self) -> Inputs | object:
        """The next item, or END."""
        if self._later is not None:
            return await anext(self._later, END)
        return next(self._now, END) if self._now is not None else END

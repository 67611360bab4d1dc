"""Tokens to text while they come: characters that several tokens make together, and stop sequences that begin in one token and end in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["StopWatch", "TextStream"]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_HELD = 32  # tokens: what is no character by then will not become one


class TextStream:
    """The text that tokens add, one token at a time: `decode` may make another text of a token by what stands before it, and half a character is none.

    What was returned is never taken back, and all of it together is what `decode` makes of all tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        """`before`: tokens that are there already; they give no text, but bear on what follows."""
        self._decode = decode
        self._tokens = list(before)[-_LONGEST_HELD:]  # those that are still needed
        self._told = len(self._tokens)  # so many of them have given their text
        self._text = (
            decode(self._tokens).rstrip(_UNKNOWN) if self._tokens else ""
        )  # ... which is this; half a character at the end may be completed

    def add(self, token: int) -> str:
        """The text that is certain now; "" where it is not yet."""
        self._tokens.append(token)
        return self._new(final=len(self._tokens) - self._told > _LONGEST_HELD)

    def end(self) -> str:
        """What is left, when no token comes any more."""
        return self._new(final=True) if len(self._tokens) > self._told else ""

    def _new(self, final: bool) -> str:
        text = self._decode(self._tokens)
        if not final and (text.endswith(_UNKNOWN) or not text.startswith(self._text)):
            return ""
        fresh = text[len(self._text) :]
        if fresh or final:
            # What the last tokens make is decided by those before them: they stay until the next text is told.
            self._tokens = self._tokens[self._told :]
            self._told = len(self._tokens)
            self._text = self._decode(self._tokens)
        return fresh


class StopWatch:
    """Text as it comes, up to the stop sequence that is whole first (of two, the longer), which is not part of it. What may be a sequence's beginning is held back.
    Where the text is the same, so is what comes out, whatever its pieces were."""

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = tuple(sequences)
        self._longest = max(map(len, self._sequences), default=0)
        self._held = ""
        self.found = ""  #: the sequence that ended the text

    def add(self, text: str) -> str:
        """What is certain to come before any stop sequence."""
        if self.found:
            return ""
        text = self._held + text
        places = [(at + len(sequence), at, sequence) for sequence in self._sequences if (at := text.find(sequence)) >= 0]
        if places:
            _, at, self.found = min(places)
            self._held = ""
            return text[:at]
        kept = self._beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def end(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """How many of the last characters may begin a sequence."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(sequence.startswith(tail) for sequence in self._sequences):
                return length
        return 0

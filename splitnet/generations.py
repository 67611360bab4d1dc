"""How a deployment's generations are called. A name may be there in several at once, each with a plan of its own: that is how a new plan takes
over from an old one without a gap."""

from __future__ import annotations

__all__ = ["FIRST", "generation_key", "parse_key"]

FIRST = 1
_MARK = "@"


def generation_key(name: str, generation: int) -> str:
    """What a generation is called among nodes: "digits" (the first), "digits@2". A name has no "@" of its own."""
    return name if generation <= FIRST else f"{name}{_MARK}{generation}"


def parse_key(key: str) -> tuple[str, int]:
    """The name, and the generation: 0 where the key is a name alone."""
    name, mark, number = key.partition(_MARK)
    return (name, int(number)) if mark and number.isascii() and number.isdigit() and len(number) < 10 else (key, 0)

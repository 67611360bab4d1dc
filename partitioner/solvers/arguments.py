"""Whether what a caller gave is of the kind that it should be: for those who call without a type checker.

What the figures and names in it mean is checked where they are used; here it is made sure that they can be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Integral
from typing import Any

import numpy as np

from partitioner.cost import CodecFigures, Overhead
from splitnet.errors import BadInput
from splitnet.noise import Noise

__all__ = ["check_kinds", "is_number"]

_Is = Callable[[Any], bool]
_LONGEST = 120  # characters of what was given that an error repeats


def is_number(given: Any) -> bool:
    return isinstance(given, int | float | np.integer | np.floating) and not isinstance(given, bool)


_NAMED = {"figures": "codecs"}  # `partitioner.plan` calls by this name what only holds figures


def check_kinds(**given: Any) -> None:
    """By the names of `partitioner.solve`'s and `partitioner.plan`'s arguments; None is whatever the default is. Raises BadInput naming the
    argument, what was expected, and what came."""
    for name, value in given.items():
        expected, found = _KINDS[name]
        if (value is not None or name in _NEEDED) and (wrong := found(value)) is not None:
            raise BadInput(f"{_NAMED.get(name, name)}: expected {expected}, got {wrong}")


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _one(accepted: _Is) -> Callable[[Any], str | None]:
    return lambda given: None if accepted(given) else _shown(given)


def _some(accepted: _Is) -> Callable[[Any], str | None]:
    def found(given: Any) -> str | None:
        if not _is_collection(given):
            return _shown(given)
        return next((_shown(item) for item in given if not accepted(item)), None)

    return found


def _mapping(key: _Is, value: _Is) -> Callable[[Any], str | None]:
    def found(given: Any) -> str | None:
        if not isinstance(given, Mapping):
            return _shown(given)
        return next((f"{_shown(k)}: {_shown(v)}" for k, v in given.items() if not (key(k) and value(v))), None)

    return found


def _either(mapping: Callable[[Any], str | None], other: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    return lambda given: mapping(given) if isinstance(given, Mapping) else other(given)


def _is_text(given: Any) -> bool:
    return isinstance(given, str)


def _is_whole(given: Any) -> bool:
    return isinstance(given, Integral) and not isinstance(given, bool)


def _is_collection(given: Any) -> bool:
    """A text is one of letters, which nobody means."""
    return isinstance(given, Collection) and not isinstance(given, str | bytes | np.ndarray)


def _is_texts(given: Any) -> bool:
    return _is_collection(given) and all(map(_is_text, given))


def _pair(first: _Is, second: _Is) -> _Is:
    return lambda given: isinstance(given, tuple | list) and len(given) == 2 and first(given[0]) and second(given[1])


def _is_stages(given: Any) -> bool:
    return isinstance(given, range) or _is_whole(given)


def _is_figures(given: Any) -> bool:
    return isinstance(given, CodecFigures)


def _is_overhead(given: Any) -> bool:
    return isinstance(given, Overhead)


def _is_anything(given: Any) -> bool:
    return True


_NEEDED = ("devices", "links", "objective", "tolerance", "margin", "batch")
_PATTERNS = _some(_is_text)
_KINDS: Mapping[str, tuple[str, Callable[[Any], str | None]]] = {
    "devices": ("a mapping of names to bytes of memory", _mapping(_is_text, _is_anything)),
    "links": ("a mapping (a, b) -> (bytes per second, seconds)", _mapping(_pair(_is_text, _is_text), _pair(_is_anything, _is_anything))),
    "objective": ("'latency' or 'throughput'", _one(_is_text)),
    "codecs": ("a mapping of names to CodecFigures, or names", _either(_mapping(_is_text, _is_figures), _PATTERNS)),
    "stages": ("a whole number or a range", _one(_is_stages)),
    "max_stages": ("a whole number", _one(_is_whole)),
    "pin": ("a mapping of patterns to nodes' names", _mapping(_is_text, _is_text)),
    "forbid": ("nodes' names, or a mapping of them to patterns", _either(_mapping(_is_text, _is_texts), _PATTERNS)),
    "at": ("a sequence of operators or modules", _PATTERNS),
    "nodes": ("a sequence of nodes' names", _PATTERNS),
    "input_at": ("a node's name", _one(_is_text)),
    "output_at": ("a node's name", _one(_is_text)),
    "private": (
        "(node, how many operators or a module)",
        _one(_pair(_is_text, lambda which: isinstance(which, str | int) and not isinstance(which, bool))),
    ),
    "taken": ("a mapping of nodes' names to (bytes, share of time)", _mapping(_is_text, _pair(is_number, is_number))),
    "lossless": ("True or False", _one(lambda given: isinstance(given, bool))),
    "figures": ("a mapping of names to CodecFigures", _mapping(_is_text, _is_figures)),
    "link_codecs": ("a mapping (a, b) -> codecs' names", _mapping(_pair(_is_text, _is_text), _is_texts)),
    "max_accuracy_loss": ("a number", _one(is_number)),
    "overheads": ("a mapping of names to Overhead", _mapping(_is_text, _is_overhead)),
    "batch": ("a whole number of at least 1", _one(_is_whole)),
    "microbatches": ("a sequence of whole numbers", _some(_is_whole)),
    "tolerance": ("a number", _one(is_number)),
    "margin": ("a number", _one(is_number)),
    "noise": ("a Noise", _one(lambda given: isinstance(given, Noise))),
}

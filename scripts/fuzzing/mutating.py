"""Damage: bytes that are nearly a valid document."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

__all__ = ["mutated"]

_NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    65535,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    (1 << 53) + 1,
    (1 << 63) - 1,
    1 << 64,
    -(1 << 63),
    10**30,
)
_VALUES: tuple[Any, ...] = (
    None, True, False, "", "a", "../x", "x" * 300, "\u0000", "\ud800", "aten.add.Tensor", [], {}, [[]], {"": 0}, 0.5, -0.0, 1e308, float("inf"), float("nan"), *_NUMBERS,
)  # fmt: skip
_PIECES = (
    b"\x00",
    b"\xff" * 4,
    b"\xff" * 10,
    b"\x80" * 10 + b"\x01",
    b"{",
    b"[" * 50,
    b'"',
    b"\\u0000",
    b"\n",
    b"=",
    b"]]",
    b"\x80\x04.",
    b"PK\x03\x04",
    b"\x28\xb5\x2f\xfd",
)


def mutated(chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, with one to four changes; where it is JSON, half of the time changes that leave it so."""
    data = chance.choice(seeds)
    if _is_json(data) and chance.random() < 0.5:
        return _json_mutated(chance, data)
    for _ in range(chance.randint(1, 4)):
        data = _CHANGES[chance.randrange(len(_CHANGES))](chance, data, seeds)
    return data[: 1 << 16]


def _flip(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    if not data:
        return data
    at = chance.randrange(len(data))
    return data[:at] + bytes((data[at] ^ (1 << chance.randrange(8)),)) + data[at + 1 :]


def _overwrite(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at, piece = chance.randrange(len(data) + 1), chance.randbytes(chance.randint(1, 8))
    return data[:at] + piece + data[at + len(piece) :]


def _number(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    size = chance.choice((1, 2, 4, 8))
    at = chance.randrange(len(data) + 1)
    value = chance.choice(_NUMBERS) & ((1 << 8 * size) - 1)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def _insert(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(_PIECES) + data[at:]


def _cut(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + data[at + chance.choice((1, 2, 8, 64, len(data))) :]


def _repeat(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    at, size = chance.randrange(len(data) + 1), chance.choice((1, 4, 16, 128))
    return data[: at + size] + data[at : at + size] * chance.choice((1, 2, 50)) + data[at + size :]


def _splice(chance: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    other = chance.choice(seeds)
    return data[: chance.randrange(len(data) + 1)] + other[chance.randrange(len(other) + 1) :]


_CHANGES = (_flip, _overwrite, _number, _insert, _cut, _repeat, _splice)


def _json_mutated(chance: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    place = chance.randrange(len(lines))  # JSON lines: one of them
    if len(lines) > 1 and _is_json(lines[place]):
        return b"".join((*lines[:place], _json_mutated(chance, lines[place]), *lines[place + 1 :]))
    document = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        parent: Any = None
        key: Any = None
        node = document
        while isinstance(node, dict | list) and node and (parent is None or chance.random() < 0.75):
            parent, key = node, chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = node[key]
        if parent is None:
            return json.dumps(chance.choice(_VALUES)).encode()
        change = chance.random()
        if change < 0.6:
            parent[key] = copy.deepcopy(chance.choice(_VALUES))  # or one list would hold another, and that one the first
        elif change < 0.75:
            del parent[key]
        elif isinstance(parent, dict):
            parent[chance.choice((key + "x", "", "version", "nodes"))] = copy.deepcopy(node)
        else:
            parent.insert(key, copy.deepcopy(node))
    return json.dumps(document, sort_keys=chance.random() < 0.5, separators=(",", ":")).encode() + b"\n"


def _is_json(data: bytes) -> bool:
    """A whole object, or several on lines of their own."""
    return data[:1] == b"{" and data[-2:] == b"}\n"

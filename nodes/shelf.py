"""The engines of a node, each once: generations whose plans share a shard share its engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nodes.engines.base import Engine

__all__ = ["EngineShelf"]


@dataclass(slots=True)
class _Place:
    engine: Engine
    weight_bytes: int
    users: int = 1


class EngineShelf:
    """By the sha256 of the shard's manifest, and what else decides what the engine is: the caller says. Whichever engine was chosen for a shard
    stays until its last user has gone."""

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}

    def take(self, key: str) -> Engine | None:
        """To be given back. None where nobody has it: then the caller loads one and puts it here."""
        place = self._places.get(key)
        if place is None:
            return None
        place.users += 1
        return place.engine

    def put(self, key: str, engine: Engine, weight_bytes: int) -> None:
        """The caller is its first user."""
        self._places[key] = _Place(engine, weight_bytes)

    def give_back(self, keys: Iterable[str]) -> None:
        """One user less of each. To be called where engines may be freed: in the compute thread."""
        for key in keys:
            place = self._places.get(key)
            if place is None:
                continue
            place.users -= 1
            if not place.users:
                del self._places[key]

    def held_bytes(self, key: str) -> int:
        """Of weights that are here already."""
        place = self._places.get(key)
        return 0 if place is None else place.weight_bytes

    @property
    def saved_bytes(self) -> int:
        """What the users would take besides, if each had an engine of its own."""
        return sum((place.users - 1) * place.weight_bytes for place in self._places.values())

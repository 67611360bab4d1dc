"""What this node serves, written down, so that it serves it again after its power was cut.

    DIR/deployments/<hash of the name>.json    one deployment: all its generations that are here, and which of them takes the requests

Each file is replaced whole or not at all, and holds its own hash: one that was damaged is set aside and not used. Every method blocks on the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodes.blob import translated
from splitnet.errors import BadPlan
from splitnet.plan import Plan
from splitnet.security.files import make_private_directory, write_file

__all__ = ["FamilyRecord", "GenerationRecord", "Records"]

_FORMAT, _VERSION = "splitnet-deployment", 1
_LARGEST_BYTES = 256 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIX, _DAMAGED = ".json", ".damaged"


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """`node`: what the plan calls this one. `shards`: by stage, of the stages that are held here."""

    node: str
    plan: Plan
    shards: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FamilyRecord:
    """As `nodes.family.Family` has it."""

    name: str
    active: int = 0
    canary: int = 0
    share: float = 0.0
    kept: int = 0
    address: str = ""
    entered_here: bool = False
    term: int = 0
    generations: Mapping[int, GenerationRecord] | None = None

    def to_bytes(self) -> bytes:
        state = {key: value for key, value in _state(self).items() if key != "generations"}
        generations = {
            str(number): {"node": one.node, "plan": one.plan.to_json(), "shards": dict(one.shards)} for number, one in self.held.items()
        }
        body = {"format": _FORMAT, "version": _VERSION, **state, "generations": generations}
        return json.dumps({**body, "sha256": _digest(body)}, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> FamilyRecord:
        """Raises BadPlan for what no node has written."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict) or body.get("format") != _FORMAT:
            raise BadPlan("not a record of a deployment")
        if body.get("version") != _VERSION:
            raise BadPlan(f"a record of version {body.get('version')!r:.40}, this splitnet reads {_VERSION}")
        if body.pop("sha256", None) != _digest(body):
            raise BadPlan("its sha256 is wrong: it was damaged on the disk")
        return _read(body)

    @property
    def held(self) -> Mapping[int, GenerationRecord]:
        return self.generations or {}


class Records:
    """`directory`: the node's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "deployments"

    def read(self) -> tuple[list[FamilyRecord], list[str]]:
        """All of them, and what is wrong with those that cannot be used: these are set aside, and looked at no more. Raises StorageFailure."""
        make_private_directory(self.directory)
        found, faults = [], []
        with translated(f"the records in {str(self.directory)!r}"):
            for path in sorted(self.directory.glob("*" + _SUFFIX)):
                try:
                    if path.stat().st_size > _LARGEST_BYTES:
                        raise BadPlan(f"more than {_LARGEST_BYTES} bytes")
                    record = FamilyRecord.from_bytes(path.read_bytes())
                    if path != self._path(record.name):
                        raise BadPlan(f"a record of {record.name!r}, under another name")
                    found.append(record)
                except BadPlan as error:
                    path.replace(path.with_suffix(_DAMAGED))
                    faults.append(f"{path.with_suffix(_DAMAGED)}: {error.message}")
            for path in self.directory.glob(".*.part"):  # of a process that was killed while it wrote
                path.unlink(missing_ok=True)
        return found, faults

    def write(self, name: str, record: FamilyRecord | None) -> None:
        """None: nothing of that name is here any more. Raises StorageFailure; then what was written before stands."""
        if record is None:
            with translated(f"the record of {name!r}"):
                self._path(name).unlink(missing_ok=True)
            return
        make_private_directory(self.directory)
        write_file(self._path(name), record.to_bytes(), private=True)

    def forget(self) -> None:
        """All of them. Raises StorageFailure."""
        with translated(f"the records in {str(self.directory)!r}"):
            for path in self.directory.glob("*" + _SUFFIX) if self.directory.is_dir() else ():
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / (hashlib.sha256(name.encode(errors="replace")).hexdigest()[:32] + _SUFFIX)


def _state(record: FamilyRecord) -> dict[str, Any]:
    return {field: getattr(record, field) for field in FamilyRecord.__slots__}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(body: Mapping[str, Any]) -> FamilyRecord:
    kinds: dict[str, type] = {
        "name": str, "active": int, "canary": int, "share": float, "kept": int, "address": str, "entered_here": bool, "term": int,
    }  # fmt: skip
    state: dict[str, Any] = {}
    for key, kind in kinds.items():
        value: Any = body.get(key)
        most = {int: 1 << 53, float: 1}.get(kind)
        if type(value).__name__ != kind.__name__ or (most is not None and not 0 <= value <= most):
            raise BadPlan(f"{key}: expected {kind.__name__}, got {value!r:.80}")
        state[key] = value
    generations = body.get("generations")
    if not state["name"] or not isinstance(generations, dict) or not math.isfinite(state["share"]):
        raise BadPlan("its name or its generations are missing")
    return FamilyRecord(**state, generations={_number(key): _generation(key, value) for key, value in generations.items()})


def _number(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) > 0):
        raise BadPlan(f"generations: {key!r:.40} is no number of one")
    return int(key)


def _generation(key: str, value: Any) -> GenerationRecord:
    if not isinstance(value, dict) or not isinstance(value.get("node"), str) or not isinstance(value.get("plan"), str):
        raise BadPlan(f"generation {key}: its node or its plan is missing")
    shards = value.get("shards")
    if not isinstance(shards, dict) or not all(isinstance(one, str) and _SHA256.fullmatch(one) for one in shards.values()):
        raise BadPlan(f"generation {key}: its shards are no hashes")
    plan = Plan.from_json(value["plan"])
    plan.node(value["node"])
    return GenerationRecord(value["node"], plan, shards)

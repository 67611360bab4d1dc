"""What was measured on nodes, kept on this machine: $XDG_CACHE_HOME/splitnet/profiles, by default ~/.cache/splitnet/profiles.

One JSON file per model (graph and weights), sizes and kind of device (processor, threads, engine); in it one entry per speed, because two boxes
with one processor may differ (cooling, power, neighbours). A file that cannot be read, or is of another version, counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partitioner.profiling import Column
from partitioner.structure import Structure
from splitnet import __version__
from splitnet.cluster import ClusterNode, same_speed

__all__ = ["REFERENCE", "ProfileCache", "default_directory"]

REFERENCE = "reference"  #: a node's engine unless it was told otherwise
_VERSION = 2


def default_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "splitnet" / "profiles"


@dataclass(frozen=True)
class ProfileCache:
    """Raises OSError where the directory cannot be written."""

    directory: Path

    def find(self, structure: Structure, node: ClusterNode, engine: str = REFERENCE) -> Column | None:
        """What a node of this kind and speed, told to use that engine, took for this model at these sizes."""
        for entry in self._entries(structure, node, engine):
            if same_speed(entry["reference_s"], node.reference_s) and len(entry["seconds"]) == len(structure.vertices):
                day = time.strftime("%Y-%m-%d", time.localtime(entry["time_s"]))
                return Column(tuple(entry["seconds"]), f"{entry['how']} (kept from {day})", entry["sustained"])
        return None

    def keep(self, structure: Structure, node: ClusterNode, column: Column, engine: str = REFERENCE) -> None:
        """Replaces what was known of a device of this kind and speed. Nothing is kept of a device whose kind is not known."""
        if not node.processor or not node.reference_s:
            return
        entries = [e for e in self._entries(structure, node, engine) if not same_speed(e["reference_s"], node.reference_s)]
        figures = {"seconds": column.seconds, "sustained": column.sustained, "how": column.how}
        entries.append({"reference_s": node.reference_s, "time_s": time.time(), **figures})
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(structure, node, engine)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps({"version": _VERSION, "model": structure.name, "entries": entries}, indent=1))
        temporary.replace(path)

    def _entries(self, structure: Structure, node: ClusterNode, engine: str) -> list[dict[str, Any]]:
        try:
            document = json.loads(self._path(structure, node, engine).read_text())
            if document["version"] != _VERSION:
                return []
            return [_entry(e) for e in document["entries"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []

    def _path(self, structure: Structure, node: ClusterNode, engine: str) -> Path:
        threads = (node.threads, min(node.cores or node.threads, node.threads))
        key = [structure.sha256, sorted(structure.symbols.items()), node.processor, node.device, *threads, engine, __version__]
        return self.directory / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def _entry(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "reference_s": float(document["reference_s"]),
        "seconds": [float(s) for s in document["seconds"]],
        "sustained": float(document["sustained"]),
        "how": str(document["how"]),
        "time_s": float(document["time_s"]),
    }

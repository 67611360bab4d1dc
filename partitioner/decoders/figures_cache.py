"""What was measured of decoder models, kept on this machine beside other profiles (see `partitioner.profile_cache`).

One JSON file per config, column ("bfloat16/int4"), lengths and kind of device; in it one entry per speed. Weights are no part of it: what was measured of one model holds for every other of the same
config. A file that cannot be read, or is of another version, counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partitioner.decoders.figures import Times, Workload
from partitioner.decoders.model import DecoderModel
from splitnet import __version__
from splitnet.cluster import ClusterNode, same_speed

__all__ = ["TimesCache"]

_VERSION = 1


@dataclass(frozen=True)
class TimesCache:
    """Raises OSError where the directory cannot be written. `refresh`: nothing is found in it."""

    directory: Path
    refresh: bool = False

    def find(self, model: DecoderModel, node: ClusterNode, column: str, workload: Workload, batches: Sequence[int]) -> Times | None:
        """What a node of this kind and speed took."""
        for entry in self._entries(self._path(model, node, column, workload, batches)) if not self.refresh else []:
            times: Times = entry["times"]
            if same_speed(entry["reference_s"], node.reference_s) and len(times.prefill) == len(model.vertices):
                day = time.strftime("%Y-%m-%d", time.localtime(entry["time_s"]))
                return times.scaled(1.0, f"{times.how} (kept from {day})")
        return None

    def keep(self, model: DecoderModel, node: ClusterNode, column: str, workload: Workload, batches: Sequence[int], times: Times) -> None:
        """Replaces what was known of a device of this kind and speed. Nothing is kept of a device whose kind is not known."""
        if not node.processor or not node.reference_s:
            return
        path = self._path(model, node, column, workload, batches)
        entries = [e for e in self._entries(path) if not same_speed(e["reference_s"], node.reference_s)]
        entries.append({"reference_s": node.reference_s, "time_s": time.time(), "times": times})
        self.directory.mkdir(parents=True, exist_ok=True)
        document = [e | {"times": {n: getattr(e["times"], n) for n in ("prefill", "decode", "step_s", "how")}} for e in entries]
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps({"version": _VERSION, "model": model.name, "entries": document}, indent=1))
        temporary.replace(path)

    @staticmethod
    def _entries(path: Path) -> list[dict[str, Any]]:
        try:
            document = json.loads(path.read_text())
            if document["version"] != _VERSION:
                return []
            return [
                {
                    "reference_s": float(e["reference_s"]),
                    "time_s": float(e["time_s"]),
                    "times": Times(
                        tuple(float(s) for s in e["times"]["prefill"]), tuple(tuple(float(s) for s in row) for row in e["times"]["decode"]),
                        float(e["times"]["step_s"]), str(e["times"]["how"]),
                    ),
                }
                for e in document["entries"]
            ]  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []

    def _path(self, model: DecoderModel, node: ClusterNode, column: str, workload: Workload, batches: Sequence[int]) -> Path:
        threads = (node.threads, min(node.cores or node.threads, node.threads))
        lengths = (workload.chunk_tokens, workload.cached_tokens, *batches)
        key = ["decoder", dict(model.config), column, *lengths, node.processor, node.device, *threads, __version__]
        return self.directory / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"

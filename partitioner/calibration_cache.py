"""Calibrations, kept on this machine: $XDG_CACHE_HOME/splitnet/calibrations, by default ~/.cache/splitnet/calibrations.

One file per model (graph and weights), samples, metric, output and batch; what is measured later (other cuts, other codecs) is added to it.
A file that cannot be read, or is of another version of splitnet, counts as absent: codecs may change.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from partitioner.calibration import Calibration
from partitioner.profile_cache import default_directory as profiles
from splitnet import __version__
from splitnet.errors import BadModel

__all__ = ["CalibrationCache", "default_directory"]


def default_directory() -> Path:
    return profiles().parent / "calibrations"


@dataclass(frozen=True)
class CalibrationCache:
    """Raises OSError where the directory cannot be written."""

    directory: Path

    def find(self, like: Calibration) -> Calibration | None:
        """What is known of the same model, samples, metric, output and batch."""
        return _read(self._path(like))

    def keep(self, calibration: Calibration) -> None:
        """Replaces what was known."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(calibration)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        temporary.write_text(calibration.to_json())
        temporary.replace(path)

    def newest(self, model_sha256: str, metric: str = "") -> Calibration | None:
        """The last one of this model, by any samples, and any metric unless one is named."""
        files = sorted(self.directory.glob(f"{model_sha256[:32]}-{_release()}-*.json"), key=lambda path: -path.stat().st_mtime)
        found = (c for c in map(_read, files) if c is not None and c.model_sha256 == model_sha256 and metric in ("", c.metric))
        return next(found, None)

    def _path(self, like: Calibration) -> Path:
        key = [like.data_sha256, like.samples, like.metric, like.output, like.batch]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        return self.directory / f"{like.model_sha256[:32]}-{_release()}-{digest}.json"


def _release() -> str:
    return hashlib.sha256(__version__.encode()).hexdigest()[:8]


def _read(path: Path) -> Calibration | None:
    try:
        return Calibration.load(path)
    except BadModel:
        return None

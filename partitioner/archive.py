""".pt2 files: torch.export archives, looked through before torch opens them.

torch.export.load unpickles what an archive marks as pickled (torch/export/pt2_archive/_package.py: `use_pickle`, custom and opaque objects,
the legacy weights), and evaluates the expressions of symbolic sizes. Only archives without pickles are opened, and only on the
machine of somebody who trusts the file; a node never opens one.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitnet.errors import BadModel

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph

__all__ = ["load_archive", "refuse_pickles"]

_REMEDY = "make one with torch.export.save(torch.export.export(module, inputs), path)"
_KNOWN = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|version|\.data/[^/]+|extra/.*|models/[^/]+\.json|data/sample_inputs/[^/]+\.pt|"
    r"data/(weights|constants)/((weight|tensor)_\d+|[^/]+_config\.json))\Z"
)


def load_archive(path: Path) -> ModelGraph:
    """Raises BadModel where there is no archive, where it holds pickles, or where torch cannot load it."""
    if not path.is_file():
        raise BadModel(f"no such file: {path}", remedy=_REMEDY)
    refuse_pickles(path)
    import torch

    from partitioner.aligning import align_module
    from partitioner.capturing import capture

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its format
            program = torch.export.load(str(path))
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise BadModel(f"{path}: this torch cannot load it: {type(error).__name__}: {text[:300]}", remedy=_REMEDY) from error
    if program.example_inputs is None:
        raise BadModel(f"{path}: the archive holds no example inputs", remedy=_REMEDY)
    args, kwargs = program.example_inputs
    module = program.module(check_guards=False)
    align_module(module)
    placeholders: dict[str, Any] = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    inputs = [(name, placeholders[name]) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    dynamic = {
        name: {axis: f"{name}_{axis}" for axis, size in enumerate(list(value.shape)) if axis and isinstance(size, torch.SymInt)}
        for name, value in inputs
        if hasattr(value, "shape")
    }
    example = dict(kwargs) if kwargs and not args else args
    return capture(module, example, name=path.stem, dynamic_shapes=dynamic)


def refuse_pickles(path: Path) -> None:
    """Raises BadModel for an archive with any member that torch would unpickle without restriction."""

    def fault(name: str, what: str) -> BadModel:
        return BadModel(f"{path}: member {name!r:.200} {what}", remedy="export the module again without custom objects, or use py:")

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in names:
                if names.count(name) > 1:
                    raise fault(name, "stands twice")
                if not _KNOWN.match(name):
                    raise fault(name, "is no part of a plain .pt2 archive: it may be pickled")
                if name.endswith("_config.json"):
                    entries = json.loads(archive.read(name))["config"].values()
                    if any(entry["use_pickle"] is not False for entry in entries):
                        raise fault(name, "says that tensors are pickled")
                    if any(not re.match(r"(weight|tensor)_\d+\Z", entry["path_name"]) for entry in entries):
                        raise fault(name, "names an object that is pickled")
                elif "/sample_inputs/" in name:
                    _check_samples(archive.read(name), fault, name)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadModel(f"{path}: not a .pt2 archive: {type(error).__name__}: {error}", remedy=_REMEDY) from None


def _check_samples(data: bytes, fault: Callable[[str, str], BadModel], name: str) -> None:
    """torch falls back to the full unpickler where the restricted one refuses; here that is the end."""
    import torch

    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # noqa: BLE001 - told as ours
        raise fault(name, f"holds pickled objects that are not tensors: {type(error).__name__}") from None

"""MODEL arguments: `hf:DIR_OR_REPO`, `py:package.module:factory`, `FILE.pt2`, `FILE.onnx`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitnet.errors import BadModel, MissingExtra, SplitnetError

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph

__all__ = ["load_model"]

_FORMS = "MODEL is hf:DIR_OR_REPO (config.json and safetensors), py:package.module:factory, a .pt2 or a .onnx file"


def load_model(spec: str) -> ModelGraph:
    """Loads and captures the MODEL that `spec` names.

    hf: a directory, or a repository of the hub, that `transformers` can load from safetensors; example inputs follow from its config.
    py: the factory is imported (from the current directory too) and called; it returns the module and its example inputs.
    .pt2: a torch.export archive of your own, whose example inputs were saved with it. Loading one can run code that stands in it, so
    load only files that you trust; archives whose weights or constants are pickled are refused.
    .onnx: a model that nodes run with ONNX Runtime only. Example inputs are made up; without a control flow, and in the standard domain.

    Raises BadModel where there is no such model, MissingExtra where `transformers` is not installed, CaptureError as `capture` does.
    """
    if spec.startswith("hf:"):
        return _from_hub(spec.removeprefix("hf:"), spec)
    if spec.startswith("py:"):
        return _from_factory(spec.removeprefix("py:"), spec)
    if spec.endswith(".pt2"):
        from partitioner.archive import load_archive

        return load_archive(Path(spec))
    if spec.endswith(".onnx"):
        from partitioner.onnx_model import load_onnx

        return load_onnx(Path(spec), spec)
    raise BadModel(f"MODEL {spec!r} is not understood", remedy=_FORMS)


# ----------------------------------------------------------------------------------------------------------------------- hf


def _from_hub(source: str, spec: str) -> ModelGraph:
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra(f"{spec}: transformers is not installed", remedy="pip install 'splitnet[hf]'")
    from partitioner.hub import load_pretrained  # imports transformers, which takes seconds

    return load_pretrained(source, spec)


# ----------------------------------------------------------------------------------------------------------------------- py


def _from_factory(target: str, spec: str) -> ModelGraph:
    from partitioner.capturing import capture

    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise BadModel(f"{spec}: expected py:package.module:factory", remedy=_FORMS)
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise BadModel(
            f"{spec}: cannot import {module_name!r}: {error}", remedy="run from the directory that holds it, or install its package"
        ) from None
    finally:
        if added:
            sys.path.remove(here)
    factory = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise BadModel(
                f"{spec}: module {module_name!r} has no {attribute!r}", remedy="name a function that returns (module, example_inputs)"
            )
        factory = getattr(factory, part)
    if not callable(factory):
        raise BadModel(f"{spec}: {attribute!r} is a {type(factory).__name__}, not a function", remedy="name a function without arguments")
    try:
        made = factory()
    except SplitnetError:
        raise
    except Exception as error:
        raise BadModel(f"{spec}: the factory failed: {type(error).__name__}: {error}", remedy="it must run without arguments") from error
    import torch

    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
        raise BadModel(f"{spec}: the factory returned a {type(made).__name__}", remedy="return (torch.nn.Module, example_inputs)")
    return capture(*made, name=attribute)

"""Models by `hf:`: from_pretrained with safetensors, and example inputs that follow from the config."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from partitioner.aligning import align_module
from partitioner.capturing import capture
from partitioner.graph import ModelGraph
from splitnet.errors import BadModel, CaptureError

__all__ = ["example_inputs", "load_pretrained"]

_PLAIN = {
    "",
    "model",
    "models",
    "checkpoint",
    "pretrained",
    "weights",
    "snapshot",
    "main",
    "output",
    "out",
}  # names of folders, not of models
_SEQUENCE = 16  # tokens in the example: short, the length is symbolic where it can be
_REMEDY = "give a directory with config.json and *.safetensors, or a repository of the hub that has them"


def load_pretrained(source: str, spec: str) -> ModelGraph:
    """The model without a head (AutoModel), or the architecture that its config names where there is no such thing. Raises BadModel."""
    folder = Path(source).expanduser()
    if not folder.exists() and _is_path(source):
        raise BadModel(f"{spec}: there is no directory {folder}", remedy=_REMEDY)
    if folder.exists() and not (folder / "config.json").is_file():
        raise BadModel(f"{spec}: {folder} has no config.json", remedy=_REMEDY)
    where = str(folder) if folder.exists() else source
    progress = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()  # ours is the caller's to draw
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, about its future
        try:
            config = transformers.AutoConfig.from_pretrained(where)
            model = _load(where, config)
        except (OSError, ValueError, KeyError, ImportError) as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise BadModel(f"{spec}: cannot load it: {type(error).__name__}: {text[:300]}", remedy=_REMEDY) from error
        finally:
            if progress:
                transformers.logging.enable_progress_bar()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # a cache is no answer
    align_module(model)  # safetensors are memory-mapped
    example = example_inputs(model)
    name = _name(folder) if folder.exists() else source
    dynamic = {key: {1: "sequence"} for key in example if key in ("input_ids", "attention_mask")}
    dynamic |= {key: {1: "target"} for key in example if key == "decoder_input_ids"}
    try:
        return capture(model, example, name=name, dynamic_shapes=dynamic)
    except CaptureError:
        if not dynamic:
            raise
    captured = capture(model, example, name=name)
    warnings.warn(f"{spec}: the sequence length is fixed at {_SEQUENCE}: torch.export cannot make it symbolic", stacklevel=3)
    return captured


def _is_path(source: str) -> bool:
    """Whether what is no directory was meant as one: repositories of the hub are called NAME or OWNER/NAME."""
    return source.startswith((".", "/", "~", os.sep)) or len(Path(source).parts) > 2


def _name(folder: Path) -> str:
    """The folder's name; where that says nothing, the last part of what the model was called when it was saved, if that says more."""
    here = os.path.basename(os.path.abspath(folder))
    if not _says_nothing(here):
        return here
    try:
        saved = str(json.loads((folder / "config.json").read_bytes()).get("_name_or_path", ""))
    except ValueError:
        return here
    last = re.split(r"[/\\]", saved.rstrip("/\\"))[-1]
    return here if _says_nothing(last) else last


def _says_nothing(name: str) -> bool:
    return name.lower() in _PLAIN or not name[:1].isalnum() or re.fullmatch(r"[0-9a-f]{40}", name) is not None


def _load(where: str, config: Any) -> torch.nn.Module:
    try:
        return transformers.AutoModel.from_pretrained(where, use_safetensors=True)  # type: ignore[no-any-return]
    except ValueError:
        named = [getattr(transformers, name) for name in config.architectures or () if hasattr(transformers, name)]
        if not named:
            raise
        return named[0].from_pretrained(where, use_safetensors=True)  # type: ignore[no-any-return]


def example_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Small inputs of two items for a transformers model, by its main input and its config. Raises BadModel for a kind of input that
    is not known here."""
    config = model.config
    main = str(getattr(model, "main_input_name", "input_ids"))
    text = _text_config(config)
    inputs: dict[str, torch.Tensor] = {}
    accepts = _parameters(model)
    if main == "input_ids" or ("input_ids" in accepts and "pixel_values" in accepts):
        inputs |= _tokens(text)
    if main == "pixel_values" or "pixel_values" in accepts:
        inputs["pixel_values"] = _pixels(getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config)
    elif main == "input_features":
        inputs["input_features"] = _features(config)
    elif main == "input_values":
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # a spectrogram transformer
            inputs["input_values"] = _noise(2, config.max_length, config.num_mel_bins)
        else:
            inputs["input_values"] = _noise(2, 4000)
    elif main != "input_ids":
        raise BadModel(
            f"{type(model).__name__} takes {main!r}: no example is known for it", remedy="use py:module:factory and give your own"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepts:
        inputs["decoder_input_ids"] = _tokens(text)["input_ids"][:, :8]
    return inputs


def _text_config(config: Any) -> Any:
    for name in ("text_config", "decoder"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def _parameters(model: Any) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


def _tokens(config: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = min(_SEQUENCE, getattr(config, "max_position_embeddings", None) or _SEQUENCE)
    ids = torch.randint(3, max(4, config.vocab_size - 1), (2, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(config: Any) -> torch.Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return _noise(2, int(getattr(config, "num_channels", 3)), height, width)


def _features(config: Any) -> torch.Tensor:
    if hasattr(config, "max_source_positions"):  # Whisper: a fixed window, two frames per position
        return _noise(2, config.num_mel_bins, 2 * config.max_source_positions)
    width = getattr(config, "feature_projection_input_dim", 0) or getattr(config, "num_mel_bins", 80)
    return _noise(2, 64, width)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

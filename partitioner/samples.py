"""The user's own samples: arrays for a model's inputs, in batches, perhaps with labels."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from splitnet.array_files import read_inputs
from splitnet.errors import BadInput, MissingExtra

if TYPE_CHECKING:
    from partitioner.structure import Structure

__all__ = ["LABELS", "Batch", "Samples", "load_samples"]

LABELS = "labels"  #: the array that is no input
_TEXT = (".txt", ".text", ".md")
_TOKENS = 512  # where neither the tokenizer nor the model says how many it takes


@dataclass(frozen=True)
class Batch:
    """`labels`, one or more per sample, in the same order."""

    inputs: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Samples:
    """`count` samples of a file, in batches as the model takes them. `sha256` is of the file."""

    path: Path
    sha256: str
    batches: tuple[Batch, ...]
    count: int

    @property
    def labelled(self) -> bool:
        return self.batches[0].labels is not None


def load_samples(path: Path, structure: Structure, model: str = "", most: int | None = None, batch: int | None = None) -> Samples:
    """The samples in a file, at most `most` of them (taken evenly from all of it), in batches of `batch` (default: the structure's).

    .npz, .safetensors: arrays by the names of the model's inputs, the first dimension counting samples, and "labels" if there are any; .npy: the
    only input. .txt: one sample a line, for a `model` by hf: whose directory holds a tokenizer. Raises BadInput for what does not fit the model,
    MissingExtra where transformers is not installed.
    """
    if most is not None and most < 1:
        raise BadInput(f"at least 1 sample is needed, got {most}")
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BadInput(f"cannot read the data {str(path)!r}: {error.strerror}") from None
    if path.suffix in _TEXT:
        batches = tuple(_tokenised(path, structure, model, most, batch))
    else:
        batches = tuple(_divided(path, _arrays(path, structure), structure, most, batch))
    return Samples(path, sha256, batches, sum(len(next(iter(batch.inputs.values()))) for batch in batches))


# ------------------------------------------------------------------------------------------------------------------ arrays


def _arrays(path: Path, structure: Structure) -> dict[str, np.ndarray]:
    specs = structure.inputs
    names = [spec.name for spec in specs]
    if path.suffix == ".safetensors":
        arrays = _safetensors(path)
    elif path.suffix in (".npz", ".npy"):
        arrays = read_inputs(path, specs)
    else:
        raise BadInput(f"{path}: the data is a .npz, .npy, .safetensors or .txt file")
    if missing := [name for name in names if name not in arrays]:
        raise BadInput(
            f"{path}: there is no array {missing[0]!r}; the file has {', '.join(arrays) or 'nothing'}",
            remedy=f"give the model's inputs by name: {', '.join(names)}, and {LABELS!r} if there are any",
        )
    if unknown := sorted(set(arrays) - {*names, LABELS}):
        raise BadInput(
            f"{path}: the model has no input {unknown[0]!r}; it has {', '.join(names)}",
            remedy=f"leave it out, or call it {LABELS!r} if it holds the right answers",
        )
    return arrays


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(str(path)))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: {error}", remedy="write it with safetensors.numpy.save_file") from None


def _divided(path: Path, arrays: Mapping[str, np.ndarray], structure: Structure, most: int | None, batch: int | None) -> Iterator[Batch]:
    """Batches of the structure's size; the last may be smaller where the batch is symbolic."""
    size, symbolic = _batch_size(path, structure, batch)
    counts = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    count = counts[structure.inputs[0].name]
    for name, other in counts.items():
        if other != count:
            raise BadInput(
                f"{path}: {name!r} has {other} samples and {structure.inputs[0].name!r} has {count}",
                remedy="give every array the same first dimension",
            )
    if not count:
        raise BadInput(f"{path}: there is no sample in it")
    chosen = _evenly(count, most)
    if not symbolic:
        if len(chosen) < size:
            raise BadInput(f"{path}: the model takes batches of exactly {size} samples, and there are {len(chosen)}")
        chosen = chosen[: len(chosen) // size * size]
    for first in range(0, len(chosen), size):
        part = chosen[first : first + size]
        inputs = {spec.name: np.ascontiguousarray(arrays[spec.name][part]) for spec in structure.inputs}
        _check(path, inputs, structure)
        yield Batch(inputs, _labels(path, arrays, part))


def _batch_size(path: Path, structure: Structure, wanted: int | None) -> tuple[int, bool]:
    """(how many samples the model takes at once, whether that is its choice)."""
    firsts = {spec.shape[0] if spec.shape else None for spec in structure.inputs}
    if firsts == {"batch"}:
        return wanted or structure.batch, True
    first = next(iter(firsts))
    if len(firsts) == 1 and isinstance(first, int):
        return first, False
    raise BadInput(
        f"{path}: the inputs' first dimensions are {', '.join(map(str, firsts))}, so the data cannot be divided into samples",
        remedy="give a model all of whose inputs have the batch as their first dimension",
    )


def _evenly(count: int, most: int | None) -> np.ndarray:
    """Positions: all, or so many from first to last; data may be sorted by class."""
    return np.arange(count) if most is None or count <= most else np.linspace(0, count - 1, most).round().astype(np.int64)


def _labels(path: Path, arrays: Mapping[str, np.ndarray], part: np.ndarray) -> np.ndarray | None:
    if LABELS not in arrays:
        return None
    labels = arrays[LABELS]
    if labels.dtype.kind not in "iu":
        raise BadInput(f"{path}: {LABELS!r} must be whole numbers, got {labels.dtype}", remedy="give class numbers, or token ids")
    chosen: np.ndarray = labels[part].astype(np.int64)
    return chosen


def _check(path: Path, inputs: Mapping[str, np.ndarray], structure: Structure) -> None:
    symbols: dict[str, int] = {}
    for spec in structure.inputs:
        try:
            spec.check(inputs[spec.name], symbols)
        except BadInput as error:
            error.message = f"{path}: {error.message}"
            raise


# -------------------------------------------------------------------------------------------------------------------- text


def _tokenised(path: Path, structure: Structure, model: str, most: int | None, batch: int | None) -> Iterator[Batch]:
    """Lines as token ids; each batch is padded to its longest line, or to the model's length where that is fixed."""
    if not model.startswith("hf:"):
        raise BadInput(f"{path}: text needs a model with a tokenizer (hf:DIR)", remedy="give the inputs as arrays in a .npz file")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8: {error}") from None
    if not lines:
        raise BadInput(f"{path}: there is no sample in it", remedy="write one sample a line")
    size, symbolic = _batch_size(path, structure, batch)
    chosen = [lines[k] for k in _evenly(len(lines), most)]
    if not symbolic:
        if len(chosen) < size:
            raise BadInput(f"{path}: the model takes batches of exactly {size} samples, and there are {len(chosen)}")
        chosen = chosen[: len(chosen) // size * size]
    tokenizer, longest = _tokenizer(path, model.removeprefix("hf:"))
    fixed = {spec.shape[1] for spec in structure.inputs if len(spec.shape) > 1 and isinstance(spec.shape[1], int)}
    padding: dict[str, Any] = {"padding": "max_length", "max_length": min(fixed)} if fixed else {"padding": True, "max_length": longest}
    for first in range(0, len(chosen), size):
        encoded = tokenizer(chosen[first : first + size], truncation=True, return_tensors="np", **padding)
        if missing := [spec.name for spec in structure.inputs if spec.name not in encoded]:
            raise BadInput(
                f"{path}: the tokenizer makes {', '.join(encoded)}, and the model needs {missing[0]!r} too",
                remedy="give the inputs as arrays in a .npz file",
            )
        inputs = {spec.name: encoded[spec.name].astype(spec.dtype) for spec in structure.inputs}
        _check(path, inputs, structure)
        yield Batch(inputs)


def _tokenizer(path: Path, source: str) -> tuple[Any, int]:
    """The tokenizer, and how many tokens it cuts a line to."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtra(f"{path}: transformers is not installed, which holds tokenizers", remedy="pip install 'splitnet[hf]'")
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise BadInput(
            f"{path}: hf:{source} has no tokenizer that can be loaded: {text[:300]}", remedy="give the inputs as arrays in a .npz file"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    return tokenizer, int(min([n for n in limits if n and n < 1e6], default=_TOKENS))

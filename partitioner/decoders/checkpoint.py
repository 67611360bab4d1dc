"""A causal language model on disk: its config, and where in which safetensors file each tensor stands. Weights are read one at a time, or in pieces."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from splitnet.decoder_architectures import architecture, canonical_name, place_of
from splitnet.decoder_format import plain_config
from splitnet.errors import BadModel, BadShard, MissingExtra, StorageFailure
from splitnet.shard import STORED_DTYPES, ShardLimits, StoredTensor, read_header
from splitnet.tensors import DTYPES

__all__ = ["Checkpoint", "open_checkpoint"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LIMITS = ShardLimits(header_bytes=64 << 20)
_PIECE_BYTES = 8 << 20
_REMEDY = "give a directory with config.json and *.safetensors, or a repository of the hub that has them"
_FETCHED = ("config.json", "generation_config.json", "*.safetensors", _INDEX, "tokenizer*", "special_tokens_map.json", "chat_template*")


@dataclass(frozen=True, slots=True)
class _Place:
    """`name`: as the file has it."""

    file: Path
    name: str
    stored: StoredTensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """`config`: what decides the arithmetic, with transformers' defaults filled in. `places`: by canonical name (see
    `splitnet.decoder_architectures`). `source`: what it was opened as."""

    source: str
    folder: Path
    config: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    bos_token_ids: tuple[int, ...]
    places: Mapping[str, _Place]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.folder)) if self.folder == Path(self.source).expanduser() else self.source

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].stored.shape

    @cached_property
    def dtype(self) -> str:
        """Of most of the weights' bytes: "float32", "bfloat16" or "float16"."""
        sizes: dict[str, int] = {}
        for place in self.places.values():
            dtype = STORED_DTYPES.get(place.stored.dtype, place.stored.dtype)
            sizes[dtype] = sizes.get(dtype, 0) + place.stored.end - place.stored.begin
        return max(sizes, key=sizes.__getitem__)

    def read(self, name: str) -> np.ndarray:
        """A copy of the tensor. Raises BadModel for an element type that is no number's, StorageFailure where the file cannot be read."""
        place = self.places[name]
        stored = place.stored
        if stored.dtype not in STORED_DTYPES:
            raise BadModel(
                f"{place.file}: tensor {place.name!r} has the element type {stored.dtype}, which is not read", remedy="store it as BF16"
            )
        dtype = DTYPES[STORED_DTYPES[stored.dtype]]
        try:
            data = np.fromfile(place.file, np.uint8, stored.end - stored.begin, offset=stored.begin)
        except OSError as error:
            raise StorageFailure(f"cannot read {place.file}: {error.strerror}") from None
        return data.view(dtype).reshape(stored.shape)

    def hashed(self, on_bytes: Callable[[int, int], None] | None = None) -> str:
        """sha256 of config and weights: of the tensors by their canonical names, so that it does not matter how they are divided among files."""
        digest = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True, separators=(",", ":")).encode())
        total = sum(p.stored.end - p.stored.begin for p in self.places.values())
        done = 0
        for name in sorted(self.places):
            stored = self.places[name].stored
            digest.update(f"\n{name} {stored.dtype} {list(stored.shape)}\n".encode())
            for piece in self.pieces(name):
                digest.update(piece)
                done += len(piece)
                if on_bytes:
                    on_bytes(done, total)
        return digest.hexdigest()

    def pieces(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes as they stand in the file, a few MiB at a time."""
        place = self.places[name]
        with place.file.open("rb") as file:
            file.seek(place.stored.begin)
            left = place.stored.end - place.stored.begin
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise StorageFailure(f"{place.file} became shorter while it was read")
                left -= len(piece)
                yield piece


def open_checkpoint(source: str) -> Checkpoint:
    """A directory, or a repository of the hub (fetched into its cache). Raises BadModel where there is no such model, for an architecture that is not supported
    (with the list), a file or a tensor that the index names and that is missing; MissingExtra without transformers."""
    folder = _folder(source)
    config, eos, bos = _config(folder)
    kind = str(config["model_type"])
    places: dict[str, _Place] = {}
    for place in _tensors(folder):
        name = canonical_name(kind, place.name)
        if name is None:
            continue
        place_of(kind, name)  # that it has one
        places[name] = place
    if config.get("tie_word_embeddings"):
        _drop_tied(kind, places)
    return Checkpoint(source, folder, config, eos, bos, places)


def _drop_tied(kind: str, places: dict[str, _Place]) -> None:
    """Where head and embedding are one matrix, a file may hold either name, or both."""
    known = architecture(kind)
    head, embedding = "lm_head.weight", known.base + known.embedding
    if head in places:
        found = places.pop(head)
        places.setdefault(embedding, found)


def _folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BadModel(f"hf:{source}: {folder} has no config.json", remedy=_REMEDY)
        return folder
    if source.startswith((".", "/", "~")) or len(Path(source).parts) > 2:
        raise BadModel(f"hf:{source}: there is no directory {folder}", remedy=_REMEDY)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingExtra(f"hf:{source}: huggingface_hub is not installed", remedy="pip install 'splitnet[hf]'") from None
    try:
        return Path(snapshot_download(source, allow_patterns=list(_FETCHED)))  # resumed and kept by the library
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise BadModel(f"hf:{source}: cannot fetch it: {type(error).__name__}: {text[:300]}", remedy=_REMEDY) from error


def _config(folder: Path) -> tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]:
    """The plain config, and the ids of the tokens that end and that begin a text (generation_config.json says it better than config.json)."""
    path = folder / "config.json"
    document = _json(path)
    architecture(document.get("model_type"))  # before transformers is imported, and told to read what may be anything
    try:
        import transformers
    except ImportError:
        raise MissingExtra(f"{path}: transformers is not installed", remedy="pip install 'splitnet[hf]'") from None
    kind = architecture(document["model_type"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, about its future
        try:
            read = getattr(transformers, kind.config_class).from_dict(document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadModel(f"{path}: {type(error).__name__}: {str(error)[:300]}", remedy=_REMEDY) from error
    plain = plain_config(read.to_dict())
    said = _json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    vocabulary = int(plain["vocab_size"])

    def ids(name: str) -> tuple[int, ...]:
        value = said.get(name, getattr(read, name, None))
        found = value if isinstance(value, list) else [value]
        return tuple(dict.fromkeys(i for i in found if type(i) is int and 0 <= i < vocabulary))

    return plain, ids("eos_token_id"), ids("bos_token_id")[:1]


def _tensors(folder: Path) -> Iterator[_Place]:
    for file, names in _files(folder).items():
        if not file.is_file():
            raise BadModel(f"{folder / _INDEX} names {file.name!r}, which is missing", remedy="fetch the model again, all of its files")
        try:
            header = read_header(file, limits=_LIMITS)
        except BadShard as error:
            raise BadModel(error.message, remedy="fetch the model again") from None
        for name in header if names is None else names:
            if name not in header:
                raise BadModel(f"{file}: tensor {name!r} is missing; {_INDEX} says that it is there", remedy="fetch the model again")
            yield _Place(file, name, header[name])


def _files(folder: Path) -> Mapping[Path, list[str] | None]:
    """The files, with the tensors that the index places there; None: all that it has."""
    index = folder / _INDEX
    if index.is_file():
        found: dict[Path, list[str] | None] = {}
        mapping = _json(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise BadModel(f"{index}: expected an object `weight_map`", remedy="fetch the model again")
        for name, file in mapping.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise BadModel(f"{index}: {file!r:.200} is no file of this folder", remedy="do not use this model: it was tampered with")
            names = found.setdefault(folder / file, [])
            assert names is not None
            names.append(name)
        return found
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: None}
    others = sorted(folder.glob("*.safetensors"))
    if not others:
        pickled = next(iter(sorted([*folder.glob("*.bin"), *folder.glob("*.pt")])), None)
        said = f"; {pickled.name} is a pickle, which is not read" if pickled else ""
        raise BadModel(f"{folder} has no *.safetensors{said}", remedy="save it with model.save_pretrained(folder)")
    return dict.fromkeys(others)


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModel(f"cannot read {path}: {error.strerror}", remedy=_REMEDY) from None
    except ValueError as error:
        raise BadModel(f"{path}: not valid JSON: {error!s:.200}", remedy=_REMEDY) from None
    if not isinstance(document, dict):
        raise BadModel(f"{path}: expected a JSON object, got {type(document).__name__}", remedy=_REMEDY)
    return document

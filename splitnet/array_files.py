"""Arrays in files: what `splitnet run` reads and writes. Nothing is unpickled."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitnet.errors import BadInput, StorageFailure
from splitnet.tensors import DTYPES, TensorSpec, numpy_dtype

__all__ = ["read_array", "read_inputs", "to_json", "write_arrays"]

_FORMATS = ".npz, .npy or .json"


def read_inputs(path: Path, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """The arrays of one request: from a .npz their names, from a .json object its keys; a .npy file, or a .json list, holds the only
    input of a model that has one. Numbers in JSON become the input's dtype where it holds them; other files are taken as they are.

    Raises BadInput that names the file.
    """
    if path.suffix == ".npz":
        with _opened(path) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise BadInput(f"{path}: this is a .npy file with another name", remedy="rename it")
            try:
                return {name: _array(path, archive[name], _spec(name, specs)) for name in archive.files}
            except (ValueError, OSError, zipfile.BadZipFile) as error:
                raise BadInput(f"{path}: {error}", remedy="write it with numpy.savez, without objects in it") from None
    if path.suffix == ".json":
        document = _json(path)
        if isinstance(document, Mapping):
            return {name: _from_json(path, value, _spec(name, specs)) for name, value in document.items()}
        return {_only(path, specs).name: _from_json(path, document, _only(path, specs))}
    return {_only(path, specs).name: read_array(path, _only(path, specs))}


def read_array(path: Path, spec: TensorSpec) -> np.ndarray:
    """The array in a .npy file, or the list in a .json file. Raises BadInput that names the file."""
    if path.suffix == ".json":
        return _from_json(path, _json(path), spec)
    if path.suffix != ".npy":
        raise BadInput(f"{path}: expected a file that ends in {_FORMATS}")
    loaded = _opened(path)
    if not isinstance(loaded, np.ndarray):
        loaded.close()
        raise BadInput(f"{path}: this is a .npz file with another name", remedy="rename it")
    return _array(path, loaded, spec)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """As a .npz file. bfloat16, which that format does not know, is written as float32, exactly. Raises StorageFailure."""
    try:
        with zipfile.ZipFile(path, "w") as archive:  # numpy.savez cannot write an array named "file"
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    wide = array.astype(np.float32) if array.dtype == DTYPES["bfloat16"] else array
                    np.lib.format.write_array(member, wide, allow_pickle=False)
    except OSError as error:
        raise StorageFailure(f"cannot write {str(path)!r}: {error.strerror}") from None


def to_json(array: np.ndarray, most: int = 4096) -> dict[str, Any]:
    """The array as JSON: dtype, shape, and `data`, or beyond `most` elements `statistics`. What is not a number is a string: "nan"."""
    described: dict[str, Any] = {"dtype": array.dtype.name, "shape": list(array.shape)}
    wide = array.astype(np.float64) if array.dtype == DTYPES["bfloat16"] else array
    if array.size <= most:
        return described | {"data": _plain(wide.tolist())}
    finite = wide[np.isfinite(wide)]
    figures = {"min": finite.min, "max": finite.max, "mean": finite.mean} if finite.size and array.dtype.kind != "c" else {}
    statistics = {name: _plain(figure().item()) for name, figure in figures.items()}
    return described | {"statistics": statistics | {"not_finite": array.size - finite.size}}


def _opened(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: {error}", remedy="write it with numpy.save or numpy.savez, without objects in it") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {error}") from None


def _spec(name: str, specs: Sequence[TensorSpec]) -> TensorSpec | None:
    return next((spec for spec in specs if spec.name == name), None)


def _only(path: Path, specs: Sequence[TensorSpec]) -> TensorSpec:
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise BadInput(
            f"{path}: holds one array, and the model has {len(specs)} inputs: {names}", remedy=f"say which: {specs[0].name}={path}"
        )
    return specs[0]


def _array(path: Path, array: np.ndarray, spec: TensorSpec | None) -> np.ndarray:
    if spec is not None and spec.dtype == "bfloat16" and array.dtype == np.dtype("V2"):
        return array.view(DTYPES["bfloat16"])  # numpy.save does not know the type and writes the bare bits
    if array.dtype == object:
        raise BadInput(f"{path}: holds Python objects, which are not read", remedy="save plain numbers")
    return array


def _from_json(path: Path, value: Any, spec: TensorSpec | None) -> np.ndarray:
    """JSON has numbers of one kind only, so they become what the input takes; nothing is rounded to an integer."""
    where = f"{path}: {spec.name!r}" if spec is not None else str(path)
    try:
        array = np.asarray(value)
        if spec is None or array.dtype.kind not in "biuf":
            if array.dtype.kind not in "biuf":
                raise BadInput(f"{where}: expected numbers in lists of equal length")
            return array
        dtype = numpy_dtype(spec.dtype)
        if (array.dtype.kind == "f" and dtype.kind in "iub") or (array.dtype.kind == "b") != (dtype.kind == "b"):
            raise BadInput(f"{where}: expected {spec.dtype}, got {array.dtype}")
        return np.array(value, dtype)
    except (ValueError, OverflowError, TypeError) as error:
        raise BadInput(f"{where}: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, complex):
        return [_plain(value.real), _plain(value.imag)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

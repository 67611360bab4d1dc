"""Operators that are allowed, with arguments that torch does not check: each of these ended the process before it was refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nodes.engines import load_engine
from splitnet.errors import BadShard, EngineFailure
from splitnet.shard import Shard, open_shard, write_shard
from splitnet.tensors import TensorSpec

X = {"ref": "x"}
LEAST = -(1 << 63)


def shard(folder: Path, *operators: dict[str, Any], dtype: str = "float32") -> Shard:
    document = {"format": 1, "inputs": [{"name": "x", "kind": "tensor"}], "weights": {}, "operators": list(operators), "outputs": ["y"]}
    write_shard(
        folder, model="m", model_sha256="0" * 64, stage="s", engine="torch-graph", members={"graph.json": json.dumps(document).encode()},
        param_bytes=0, activation_bytes=0, inputs=[TensorSpec("x", dtype, ("n",))], outputs=[TensorSpec("y", "float32", ("n",))],
    )  # fmt: skip
    return open_shard(folder)


def op(name: str, *args: Any, out: Any = "y", **kwargs: Any) -> dict[str, Any]:
    return {"op": name, "args": list(args), "kwargs": kwargs, "out": out}


@pytest.mark.parametrize(
    "operators",
    [
        [op("aten.to.dtype", X, 1000)],
        [op("aten._to_copy.default", X, dtype=1000)],
        [op("aten.clone.default", X, memory_format=1000)],
        [op("aten.zeros.default", [2], layout=1)],
        [op("aten.zeros.default", [2], device="cuda:0")],
        [op("py.size", X, 0, out="n"), op("aten.to.dtype", X, {"ref": "n"})],
    ],
)
def test_a_number_is_no_dtype_and_no_memory_format(tmp_path: Path, operators: list[dict[str, Any]]) -> None:
    with pytest.raises(BadShard, match="expected (dtype|memoryformat|layout|device)") as caught:
        load_engine(shard(tmp_path, *operators), threads=1)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "operators",
    [
        [op("py.mul", "x" * 1024, 1 << 25)],
        [op("py.mul", [0] * 1000, 1 << 25)],
        [op("py.mod", "%2147483647d", 1)],
        [op("py.add", [1], [2])],
    ],
)
def test_arithmetic_on_sizes_takes_numbers_only(tmp_path: Path, operators: list[dict[str, Any]]) -> None:
    engine = load_engine(shard(tmp_path, *operators), threads=1)
    with pytest.raises(EngineFailure, match="expected a number"):
        engine.run({"x": np.zeros(3, np.float32)})


@pytest.mark.parametrize(
    ("name", "array", "args", "kwargs"),
    [
        ("_weight_norm.default", np.ones((4000, 400), np.float32), [{"ref": "one"}, 0], {}),
        ("_fft_c2r.default", np.ones((64, 3), np.complex64), [[1], 0, 1_000_000], {}),
        ("_fft_r2c.default", np.ones((8, 8), np.float32), [[1, 1], 0, True], {}),
        ("_pdist_forward.default", np.ones((3, 4, 5), np.float32), [2.0], {}),
        ("linalg_eigvals.default", np.full((17, 17), np.nan, np.float32), [], {}),
        ("div.Tensor_mode", np.array([LEAST]), [{"ref": "minus"}], {"rounding_mode": "trunc"}),
        ("div.Scalar_mode", np.array([-(1 << 31)], np.int32), [-1], {"rounding_mode": "trunc"}),
    ],
)
def test_what_torch_does_not_check(tmp_path: Path, name: str, array: np.ndarray, args: list[Any], kwargs: dict[str, Any]) -> None:
    float32, int64 = {"dtype": "float32"}, {"dtype": "int64"}
    steps = [op("aten.ones.default", [1], dtype=float32, out="one"), op("aten.full.default", [1], -1, dtype=int64, out="minus")]
    engine = load_engine(shard(tmp_path, *steps, op(f"aten.{name}", X, *args, **kwargs), dtype=str(array.dtype)), threads=1)
    with pytest.raises(EngineFailure, match=f"{name}.*ValueError"):
        engine.run({"x": array})


def test_attention_reads_only_what_it_was_given(tmp_path: Path) -> None:
    query = op("aten.expand.default", X, [4, 64, 8, 16], out="q")
    attention = op("aten._scaled_dot_product_flash_attention_for_cpu.default", {"ref": "q"}, X, X, out=["y", None])
    engine = load_engine(shard(tmp_path, query, attention), threads=1)
    with pytest.raises(EngineFailure, match="do not fit"):
        engine.run({"x": np.ones((1, 1, 8, 16), np.float32)})


def test_integer_division_goes_on_as_before(tmp_path: Path) -> None:
    engine = load_engine(shard(tmp_path, op("aten.div.Scalar_mode", X, -2, rounding_mode="trunc"), dtype="int64"), threads=1)
    assert engine.run({"x": np.array([7, -7, LEAST + 1])})["y"].tolist() == [-3, 3, (1 << 62) - 1]

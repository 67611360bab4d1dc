"""The reference engine: arrays in, arrays out, layouts kept, and errors that name the operator."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save

from nodes.engines import engine_names, load_engine
from nodes.engines.torch_graph import to_array, to_tensor
from splitnet.errors import BadInput, BadShard, EngineFailure, NotFound
from splitnet.shard import Shard, open_shard, write_shard
from splitnet.tensors import DTYPES, TensorSpec


def shard(folder: Path, operators: list[dict[str, Any]], *, inputs: dict[str, str], outputs: dict[str, str], weights: dict[str, Any] | None = None, listed: Any = None) -> Shard:  # fmt: skip
    weights = weights or {}
    if listed is None:
        listed = {
            name: {"dtype": str(w.dtype).removeprefix("torch."), "shape": list(w.shape), "order": list(range(w.ndim)), "grad": False}
            for name, w in weights.items()
        }
    document = {
        "format": 1, "inputs": [{"name": name, "kind": "tensor"} for name in inputs], "weights": listed, "operators": operators,
        "outputs": list(outputs),
    }  # fmt: skip
    members: dict[str, Any] = {"graph.json": json.dumps(document).encode()}
    if weights:
        members["weights.safetensors"] = save(weights)
    write_shard(
        folder, model="m", model_sha256="0" * 64, stage="s", engine="torch-graph", members=members, param_bytes=1 << 20, activation_bytes=0,
        inputs=[TensorSpec(n, d, ("n",)) for n, d in inputs.items()], outputs=[TensorSpec(n, d, ("n",)) for n, d in outputs.items()],
    )  # fmt: skip
    return open_shard(folder)


def op(name: str, *args: Any, out: Any = "y", **kwargs: Any) -> dict[str, Any]:
    return {"op": name, "args": list(args), "kwargs": kwargs, "out": out}


X = {"ref": "x"}


def test_it_runs(tmp_path: Path) -> None:
    weights = {"w": torch.tensor([1.0, 2.0])}
    engine = load_engine(
        shard(tmp_path, [op("aten.mul.Tensor", X, {"weight": "w"})], inputs={"x": "float32"}, outputs={"y": "float32"}, weights=weights),
        threads=1,
    )
    assert engine.name in engine_names()
    assert engine.memory_bytes() == 8
    assert engine.run({"x": np.array([3.0, np.nan], np.float32)})["y"].tolist()[0] == 3.0
    with pytest.raises(BadInput, match="'x' is missing"):
        engine.run({})
    with pytest.raises(NotFound, match="no engine 'abacus'"):
        load_engine(open_shard(tmp_path), threads=1, engine="abacus")


def test_a_failing_operator_is_named_and_the_engine_goes_on(tmp_path: Path) -> None:
    steps = [op("aten.relu.default", X, out="r"), op("aten.view.default", {"ref": "r"}, [7, 7])]
    engine = load_engine(shard(tmp_path, steps, inputs={"x": "float32"}, outputs={"y": "float32"}), threads=1)
    with pytest.raises(EngineFailure, match=r"aten\.view\.default \(-> y\) failed: RuntimeError: shape '\[7, 7\]'"):
        engine.run({"x": np.zeros(3, np.float32)})
    assert engine.run({"x": np.zeros(49, np.float32)})["y"].shape == (7, 7)


def test_wrong_argument_types_are_failures_and_not_crashes(tmp_path: Path) -> None:
    for number, step in enumerate(
        [op("aten.relu.default", "text"), op("aten.relu.default"), op("aten.relu.default", X, sneaky=1), op("aten.view.default", X, X)]
    ):
        engine = load_engine(shard(tmp_path / str(number), [step], inputs={"x": "float32"}, outputs={"y": "float32"}), threads=1)
        with pytest.raises(EngineFailure, match="failed"):
            engine.run({"x": np.zeros(3, np.float32)})


def test_sizes_do_not_grow_without_end(tmp_path: Path) -> None:
    steps = [op("py.size", X, 0, out="n")]
    steps += [op("py.mul", {"ref": f"n{i - 1}" if i else "n"}, {"ref": f"n{i - 1}" if i else "n"}, out=f"n{i}") for i in range(8)]
    steps += [op("aten.full.default", [], {"ref": "n7"})]
    engine = load_engine(shard(tmp_path, steps, inputs={"x": "float32"}, outputs={"y": "float32"}), threads=1)
    with pytest.raises(EngineFailure, match="64 bits"):
        engine.run({"x": np.zeros(1000, np.float32)})


def test_weights_are_held_against_the_graph(tmp_path: Path) -> None:
    good = {"dtype": "float32", "shape": [2], "order": [0], "grad": False}
    step = [op("aten.mul.Tensor", X, {"weight": "w"})]

    def load(name: str, weights: dict[str, Any], listed: Any) -> None:
        load_engine(
            shard(tmp_path / name, step, inputs={"x": "float32"}, outputs={"y": "float32"}, weights=weights, listed=listed), threads=1
        )

    with pytest.raises(BadShard, match="the weight 'w' is missing"):
        load("missing", {}, {"w": good})
    with pytest.raises(BadShard, match=r"weight 'w' should be float32 \(2,\), the file has float64"):
        load("dtype", {"w": torch.ones(2, dtype=torch.float64)}, {"w": good})
    with pytest.raises(BadShard, match=r"the file has float32 \(3,\)"):
        load("shape", {"w": torch.ones(3)}, {"w": good})
    with pytest.raises(BadShard, match="does not know the weight 'v'"):
        load("extra", {"w": torch.ones(2), "v": torch.ones(1)}, {"w": good})


def test_the_manifest_is_held_against_the_graph(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    made = shard(folder, [op("aten.relu.default", X)], inputs={"x": "float32"}, outputs={"y": "float32"})
    manifest = made.manifest
    other = write_shard(
        tmp_path / "t", model="m", model_sha256="0" * 64, stage="s", engine="torch-graph", inputs=manifest.inputs, param_bytes=0, activation_bytes=0,
        outputs=[TensorSpec("other", "float32", ("n",))], members={"graph.json": made.member("graph.json").read_bytes()},
    )  # fmt: skip
    with pytest.raises(BadShard, match="outputs are not the graph's"):
        load_engine(other, threads=1)


def test_weights_come_back_with_their_layout_and_aligned(tmp_path: Path) -> None:
    from partitioner.capturing import capture
    from partitioner.cutting import write_stage
    from partitioner.layout import lay_out

    module = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    module.bias.requires_grad_(False)
    captured = capture(module, torch.randn(2, 4, 5, 5))
    stage = lay_out(captured.structure, {v.name: 0 for v in captured.structure.vertices if v.op != "input"}).stages[0]
    write_stage(captured, stage, tmp_path, name="s")
    engine: Any = load_engine(open_shard(tmp_path), threads=1)
    loaded = engine._program._weights
    assert loaded["weight"].stride() == module.weight.stride() != torch.ones(8, 4, 3, 3).stride()
    assert loaded["weight"].requires_grad
    assert not loaded["bias"].requires_grad
    assert all(w.data_ptr() % 64 == 0 for w in loaded.values())
    assert engine.memory_bytes() == module.weight.nbytes + module.bias.nbytes


# --------------------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_goes_through_with_its_strides(name: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(DTYPES[name]).transpose(2, 0, 1)
    for given in (array, array[:, ::2], np.broadcast_to(array[:1], array.shape), array[:, :0], array.reshape(-1)[5].reshape(())):
        tensor = to_tensor(given)
        assert str(tensor.dtype) == f"torch.{name}"
        back = to_array(tensor)
        assert back.dtype == given.dtype
        assert back.shape == given.shape
        assert (back == given).all()
        if given.size > 1:
            assert back.strides == given.strides
            assert back.ctypes.data == given.ctypes.data


def test_read_only_and_reversed_arrays_are_taken_without_a_warning() -> None:
    array = np.arange(6.0).reshape(2, 3)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_tensor(array).tolist() == array.tolist()
        assert to_tensor(array[::-1]).tolist() == array[::-1].tolist()
        assert to_tensor(np.frombuffer(b"\x00\x3f\x80\x3f", ml_dtypes.bfloat16)).tolist() == [0.5, 1.0]


def test_numbers_and_lazy_conjugates_become_arrays() -> None:
    assert to_array(3).dtype == np.int64
    assert to_array(True).dtype == np.bool_
    assert to_array(torch.tensor([1 + 2j]).to(torch.complex64).conj()).tolist() == [1 - 2j]
    assert to_array(torch.nn.Parameter(torch.ones(1))).tolist() == [1.0]

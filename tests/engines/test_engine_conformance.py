"""What every engine must do, whichever it is: one suite, run by all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nodes.engines import ENGINES, Engine, engine_names, load_engine
from partitioner.capturing import capture
from partitioner.cutting import write_stage
from partitioner.graph import ModelGraph
from partitioner.layout import lay_out
from splitnet.errors import BadInput, BadShard, EngineFailure
from splitnet.shard import Shard, open_shard

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Mixed(torch.nn.Module):
    """Images, indices and a mask in; floats, whole numbers and booleans out; a convolution, a norm, a table, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.table = torch.nn.Embedding(10, 8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        read = self.table(ids).masked_fill(~mask[:, :, None], 0.0).sum(1)
        scores = self.head(seen + read)
        return {"scores": scores, "best": scores.argmax(-1), "sure": scores.amax(-1) > 0.5}


@pytest.fixture(scope="module")
def captured() -> ModelGraph:
    torch.manual_seed(0)
    with torch.no_grad():
        return capture(Mixed().eval(), {name: torch.from_numpy(array) for name, array in inputs(2).items()})


@pytest.fixture(scope="module")
def shard(captured: ModelGraph, tmp_path_factory: pytest.TempPathFactory) -> Shard:
    return whole(captured, tmp_path_factory.mktemp("mixed"))


def whole(model: ModelGraph, folder: Path) -> Shard:
    stage = lay_out(model.structure, {v.name: 0 for v in model.structure.vertices if v.op != "input"}).stages[0]
    write_stage(model, stage, folder, name="s")
    return open_shard(folder)


def inputs(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "image": generator.standard_normal((batch, 3, 6, 6), np.float32),
        "ids": generator.integers(0, 10, (batch, 4)),
        "mask": generator.random((batch, 4)) < 0.7,
    }


def expected(model: ModelGraph, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the shard's names: the values' own."""
    answers = model.run({name: torch.from_numpy(array.copy()) for name, array in given.items()})
    return {output.value: answers[output.spec.name].numpy() for output in model.structure.outputs}


def assert_close(actual: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert actual.keys() == wanted.keys()
    for name, array in wanted.items():
        assert actual[name].dtype == array.dtype
        assert actual[name].shape == array.shape
        np.testing.assert_allclose(actual[name], array, **TOLERANCE)


Loaded = Callable[[Shard], Engine]


@pytest.fixture(params=sorted(set(ENGINES) - {"decoder"}))  # which takes steps, not tensors: tests/decoder
def load(request: pytest.FixtureRequest) -> Loaded:
    assert request.param in engine_names()
    return lambda shard: load_engine(shard, threads=1, engine=request.param)


def test_it_computes_what_the_model_computes_at_any_batch(load: Loaded, shard: Shard, captured: ModelGraph) -> None:
    engine = load(shard)
    assert engine.name in engine_names()
    for batch in (1, 2, 7, 1):
        given = inputs(batch, seed=batch)
        assert_close(engine.run(given), expected(captured, given))


def test_a_missing_input_and_another_dtype_are_bad_input_and_nothing_breaks(load: Loaded, shard: Shard, captured: ModelGraph) -> None:
    engine, given = load(shard), inputs(3)
    for name in given:
        with pytest.raises(BadInput, match=f"{name!r} is missing"):
            engine.run({other: array for other, array in given.items() if other != name})
        with pytest.raises(BadInput, match=f"input {name!r}: expected {given[name].dtype}, got float64"):
            engine.run(given | {name: given[name].astype(np.float64)})
    assert_close(engine.run(given), expected(captured, given))


def test_any_strides_are_taken(load: Loaded, shard: Shard, captured: ModelGraph) -> None:
    engine, given = load(shard), inputs(4)
    wanted = expected(captured, given)
    image = given["image"]
    frozen = image.copy()
    frozen.flags.writeable = False
    wide = np.zeros((8, 3, 6, 9), np.float32)
    wide[::2, :, :, 2:8] = image
    layouts = {
        "channels last": np.ascontiguousarray(image.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "a part of a larger array": wide[::2, :, :, 2:8],
        "backwards": image[::-1].copy()[::-1],
        "read-only": frozen,
    }
    for what, array in layouts.items():
        assert (array == image).all(), what
        assert_close(engine.run(given | {"image": array, "ids": np.asfortranarray(given["ids"])}), wanted)
    constant = np.broadcast_to(image[:1], image.shape)
    assert_close(engine.run(given | {"image": constant}), expected(captured, given | {"image": constant.copy()}))


def test_inputs_stay_as_they_were_and_results_stay_as_they_are(load: Loaded, shard: Shard) -> None:
    engine, given = load(shard), inputs(3)
    before = {name: array.copy() for name, array in given.items()}
    first = engine.run(given)
    kept = {name: array.copy() for name, array in first.items()}
    engine.run(inputs(3, seed=5))
    assert all((given[name] == before[name]).all() for name in given)
    assert all((first[name] == kept[name]).all() for name in first)


class Fragile(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).tanh()


def test_it_stays_usable_after_an_error(load: Loaded, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = capture(Fragile().eval(), torch.tensor([[0, 1], [2, 3]]))
    engine = load(whole(model, tmp_path))
    for _ in range(3):
        with pytest.raises(EngineFailure, match="index|indices"):
            engine.run({"ids": np.array([[0, 99]])})
        given = {"ids": np.array([[1, 3]])}
        assert_close(engine.run(given), expected(model, given))


def test_several_stages_take_turns_in_one_thread(load: Loaded, captured: ModelGraph, tmp_path: Path) -> None:
    vertices = [v.name for v in captured.structure.vertices if v.op != "input"]
    layout = lay_out(captured.structure, {name: min(i // 4, 2) for i, name in enumerate(vertices)})
    for stage in layout.stages:
        write_stage(captured, stage, tmp_path / str(stage.index), name=str(stage.index))
    engines = [load(open_shard(tmp_path / str(stage.index))) for stage in layout.stages]
    assert len(engines) == 3
    for batch in (2, 5):
        given = inputs(batch, seed=batch)
        values = dict(given)
        for stage, engine in zip(layout.stages, engines, strict=True):
            values |= engine.run({spec.name: values[spec.name] for spec in stage.inputs})
        wanted = expected(captured, given)
        assert_close({name: values[name] for name in wanted}, wanted)


def test_it_says_what_its_weights_take(load: Loaded, shard: Shard, captured: ModelGraph) -> None:
    used = sum(captured.structure.param_sizes.values())
    assert load(shard).memory_bytes() == used <= shard.manifest.param_bytes


def test_a_shard_whose_weights_are_gone_is_refused(load: Loaded, shard: Shard) -> None:
    bare = Shard(shard.path, shard.manifest, {name: path for name, path in shard.files.items() if not name.endswith(".safetensors")})
    with pytest.raises(BadShard, match="weight .* is missing"):
        load(bare)

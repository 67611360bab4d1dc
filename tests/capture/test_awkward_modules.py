"""Hand-written modules, each awkward in its own way, cut at random: the bits of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import AWKWARD
from splitting import assert_same_bits, divide

from partitioner.capturing import capture
from partitioner.exporting import as_tensor
from partitioner.trees import InputTree, flatten_output


def _answer(model: torch.nn.Module, tree: InputTree) -> dict[str, torch.Tensor]:
    args, kwargs = tree.fill(tree.tensors)
    with torch.no_grad():
        return {name: as_tensor(value) for name, value in flatten_output(model(*args, **kwargs))}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
@pytest.mark.parametrize("name", AWKWARD)
def test_divided_equals_whole(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, inputs = AWKWARD[name]
    model = make().eval()
    captured = capture(model, inputs(2))
    assert captured.structure.notes == ()
    examples: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []
    for batch in (1, 2, 5):
        tree = InputTree(model, inputs(batch))
        examples.append((dict(zip(tree.names, tree.tensors, strict=True)), _answer(model, tree)))
    for seed in range(2):
        for stages in (2, 3, 5):
            divided = divide(captured, stages, seed=10 * seed + stages, folder=tmp_path / f"{seed}-{stages}")
            for given, answer in examples:
                assert_same_bits(divided.run(given, wire=seed == 0), answer)


def test_there_are_enough() -> None:
    assert len(AWKWARD) >= 10


def test_not_a_number_passes_through(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    captured = capture(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    x[1, 2] = float("nan")
    divided = divide(captured, 2, seed=1, folder=tmp_path)
    with torch.no_grad():
        answer = model(x)
    assert answer.isnan().any()
    assert_same_bits(divided.run({"input": x}), {"output": answer})


def test_outputs_and_inputs_have_the_names_that_people_expect() -> None:
    torch.manual_seed(0)
    make, inputs = AWKWARD["nested"]
    structure = capture(make().eval(), inputs(2)).structure
    assert [spec.name for spec in structure.inputs] == ["x", "more.left", "more.rest.0", "more.rest.1"]
    assert [o.spec.name for o in structure.outputs] == ["sum", "answer.hidden", "answer.parts.0", "answer.parts.1", "list.0"]
    assert structure.outputs[0].spec.shape == ("batch", 6)


def test_one_tensor_and_a_tuple() -> None:
    assert [o.spec.name for o in capture(torch.nn.Linear(2, 2), torch.ones(2, 2)).structure.outputs] == ["output"]
    assert [name for name, _ in flatten_output((torch.ones(1), [torch.ones(1)]))] == ["output.0", "output.1.0"]


def test_a_shared_weight_is_stored_once_and_goes_wherever_it_is_used(tmp_path: Path) -> None:
    make, inputs = AWKWARD["shared"]
    captured = capture(make().eval(), inputs(2))
    assert sorted(captured.weights) == ["block.bias", "block.weight", "embedding.weight"]
    vertices = [v.name for v in captured.structure.vertices if v.op != "input"]
    from partitioner.layout import lay_out

    layout = lay_out(captured.structure, {name: int(at >= 3) for at, name in enumerate(vertices)})
    assert all("embedding.weight" in stage.params for stage in layout.stages)

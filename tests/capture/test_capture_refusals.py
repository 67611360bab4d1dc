"""What cannot be captured is refused with the operator or the line; what changes is told."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from partitioner.capturing import capture
from partitioner.trees import InputTree
from splitnet.errors import BadInput, CaptureError


class _Module(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("memory", torch.zeros(4))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, self.linear(x))


def refused(function: Any, match: str, kind: type[Exception] = CaptureError) -> str:
    with pytest.raises(kind, match=match) as caught:
        capture(_Module(function), torch.randn(2, 4))
    return str(caught.value)


def test_random_operator_is_named_with_its_line() -> None:
    text = refused(lambda _, x: x + torch.randn_like(x), r"aten\.randn_like\.default draws random numbers")
    assert "test_capture_refusals.py" in text
    assert "remedy" in text


def test_dropout_that_ignores_eval_is_refused() -> None:
    refused(lambda _, x: nn.functional.dropout(x, 0.5, training=True), "random|drops out|bernoulli")


def test_a_buffer_that_the_answer_depends_on_is_named() -> None:
    def remember(module: Any, x: torch.Tensor) -> torch.Tensor:
        module.memory.add_(x.mean(0))
        return x + module.memory

    refused(remember, "'memory'")


def test_a_buffer_that_only_counts_is_left_alone() -> None:
    def count(module: Any, x: torch.Tensor) -> torch.Tensor:
        module.memory.add_(1)
        return x * 2

    with pytest.warns(UserWarning, match="'memory'"):
        captured = capture(_Module(count), torch.randn(2, 4))
    assert "memory" in captured.structure.notes[0]


def test_branching_on_data_names_the_line() -> None:
    text = refused(lambda _, x: x * 2 if x.sum() > 0 else x, "cannot be exported")
    assert "test_capture_refusals.py" in text


def test_loops_are_named() -> None:
    from torch._higher_order_ops.while_loop import while_loop

    refused(lambda _, x: while_loop(lambda t: t.sum() < 9, lambda t: (t.abs() + 1,), (x,))[0], "while_loop|cannot be exported")


def test_what_is_no_tensor_cannot_be_an_output() -> None:
    refused(lambda _, x: {"x": x, "what": object()}, "'what'")
    refused(lambda _, x: None, "returns no tensor")


def test_a_module_that_fails_on_its_example_says_so() -> None:
    with pytest.raises(CaptureError, match="fails on its own example inputs"):
        capture(nn.Linear(3, 3), torch.randn(2, 4))


def test_an_unsupported_dtype_is_named() -> None:
    refused(lambda _, x: torch.complex(x.double(), x.double()).abs(), "complex128")


def test_example_inputs_of_a_wrong_kind() -> None:
    with pytest.raises(BadInput, match="no tensor"):
        capture(nn.Linear(3, 3), (3,))
    with pytest.raises(BadInput, match="'input'"):
        capture(nn.Linear(3, 3), (object(),))
    with pytest.raises(BadInput, match="takes 1 positional"):
        InputTree(nn.Linear(3, 3), (torch.ones(1), torch.ones(1)))


def test_a_batch_that_cannot_be_symbolic_is_told() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, 2, -1) * torch.arange(float(x.shape[0] if int(x.shape[0]) == 4 else 1)).view(2, 2, 1)

    with pytest.warns(UserWarning, match="batch size is fixed at 4"):
        captured = capture(Fixed(), torch.randn(4, 3))
    assert captured.structure.inputs[0].shape == (4, 3)
    assert "fixed" in captured.structure.notes[0]


def test_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    module[2].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured = capture(module, torch.randn(3, 4))
    assert module.training
    assert module[1].training
    assert not module[2].training
    assert captured.weights["0.weight"].data_ptr() == module[0].weight.data_ptr()


def test_a_batch_of_one_is_enough() -> None:
    captured = capture(nn.Linear(4, 3), torch.randn(1, 4))
    assert captured.structure.batch == 1
    assert captured.structure.vertices[-1].output_bytes == 12
    assert captured.run({"input": torch.randn(7, 4)})["output"].shape == (7, 3)


def test_the_same_model_has_the_same_hash_and_another_weight_another() -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    first, second = (capture(module, torch.randn(2, 4)).sha256 for _ in range(2))
    assert first == second
    with torch.no_grad():
        module.bias += 1
    assert capture(module, torch.randn(2, 4)).sha256 != first


def test_more_dimensions_can_be_symbolic() -> None:
    captured = capture(nn.Linear(4, 3), torch.randn(2, 5, 4), dynamic_shapes={"input": {1: "sequence"}})
    assert captured.structure.inputs[0].shape == ("batch", "sequence", 4)
    assert captured.run({"input": torch.randn(3, 11, 4)})["output"].shape == (3, 11, 3)

"""Where a weight lies in memory decides which kernel runs: captured weights lie as a node lays them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import partitioner
from partitioner.aligning import align_module, aligned
from partitioner.capturing import capture


def misaligned(tensor: torch.Tensor, offset: int = 1) -> torch.Tensor:
    """The same numbers `offset` elements behind a 64-byte boundary."""
    buffer = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    view = buffer[offset:].view(tensor.shape)
    view.copy_(tensor.detach())
    return view.requires_grad_(tensor.requires_grad)


class Tied(nn.Module):
    """A weight under two names, one that is laid out by columns, a buffer, and an empty one; all but the empty one misaligned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.first.weight = nn.Parameter(misaligned(self.first.weight).detach())
        self.second.weight = self.first.weight
        self.second.bias = nn.Parameter(misaligned(self.second.bias).detach(), requires_grad=False)
        self.columns = nn.Parameter(misaligned(torch.randn(8, 5)).detach().t())
        self.register_buffer("offset", misaligned(torch.randn(5)))
        self.register_buffer("again", self.offset.view(5))
        self.register_buffer("empty", torch.empty(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.second(self.first(x)), self.columns) + self.offset + self.again


def test_a_weight_is_copied_only_where_it_must_be() -> None:
    there = torch.randn(7, 3)
    assert aligned(there) is there
    for weight in (misaligned(there), misaligned(there).t(), misaligned(there.requires_grad_())):
        copy = aligned(weight)
        assert copy.data_ptr() % 64 == 0
        assert torch.equal(copy, weight)
        assert copy.stride() == weight.stride()
        assert copy.requires_grad == weight.requires_grad
        assert copy.is_leaf
        assert not copy._is_view()


def test_capture_lays_weights_as_a_node_does_and_leaves_the_module_alone() -> None:
    torch.manual_seed(0)
    module = Tied().eval()
    before = {name: tensor.data_ptr() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    captured = capture(module, torch.randn(2, 8))
    assert {name: tensor.data_ptr() for name, tensor in [*module.named_parameters(), *module.named_buffers()]} == before
    assert [name for name, weight in captured.weights.items() if weight.data_ptr() % 64] == []
    assert sorted(captured.weights) == ["columns", "first.bias", "first.weight", "offset", "second.bias"]  # twins stay twins
    assert not captured.weights["second.bias"].requires_grad
    assert captured.weights["columns"].stride() == module.columns.stride()
    assert captured.weights["first.bias"].data_ptr() == module.first.bias.data_ptr()  # it lay well


def test_a_module_of_ours_is_aligned_in_place() -> None:
    torch.manual_seed(0)
    module = Tied().eval()
    expected = module(torch.ones(3, 8))
    align_module(module)
    assert [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.data_ptr() % 64] == []
    assert module.first.weight is module.second.weight
    assert module.offset.data_ptr() == module.again.data_ptr()
    assert module.columns.requires_grad
    assert not module.second.bias.requires_grad
    assert torch.allclose(module(torch.ones(3, 8)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_models_from_files_are_aligned_before_they_are_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What capture sees is aligned, so that the module and its graph are compared with the same kernels."""
    from architectures import make

    model, _ = make("vit")
    model.save_pretrained(tmp_path / "vit")
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Tied().eval(), (torch.randn(2, 8),), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "tied.pt2")
    seen: list[int] = []

    def spy(module: nn.Module, *args: object, **kwargs: object) -> object:
        seen.extend(tensor.data_ptr() % 64 for tensor in [*module.parameters(), *module.buffers()])
        return capture(module, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("partitioner.capturing.capture", spy)
    monkeypatch.setattr("partitioner.hub.capture", spy)
    partitioner.load_model(f"hf:{tmp_path / 'vit'}")
    assert seen
    partitioner.load_model(str(tmp_path / "tied.pt2"))
    assert set(seen) == {0}


def test_a_difference_that_alignment_explains_is_told_as_such() -> None:
    from partitioner.capturing import _compare

    notes: list[str] = []
    _compare("m", [("y", torch.ones(2))], [torch.ones(2) + 1e-7], notes, ["weight"])
    assert "'weight'" in notes[0]
    assert "64-byte" in notes[0]
    notes.clear()
    _compare("m", [("y", torch.ones(2))], [torch.ones(2)], notes, ["weight"])
    assert notes == []

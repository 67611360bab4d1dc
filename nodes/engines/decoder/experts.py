"""The experts of a mixture: each a matrix of its own, so that only those run (and, in 8 or 4 bits, only those are unpacked) that a row was sent to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nodes.engines.decoder.linear import Matrix, read_matrix
from nodes.engines.decoder.loading import StoredTensors

__all__ = ["Experts", "read_experts"]


class Experts(nn.Module):
    """Instead of transformers' module, which holds all experts of a layer as one tensor."""

    def __init__(self, gate_up: list[Matrix], down: list[Matrix], activation: Any) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = nn.ModuleList(gate_up), nn.ModuleList(down), activation

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        own = dict(module.named_parameters(recurse=False))
        return set(own) == {"gate_up_proj", "down_proj"} and all(tensor.ndim == 3 for tensor in own.values())

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """[rows, hidden size]; the index and weight of each row's experts [rows, k]."""
        answer = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            rows, place = torch.where(top_k_index == expert)
            gate, up = self.gate_up[expert](hidden_states[rows]).chunk(2, dim=-1)
            found = self.down[expert](self.activation(gate) * up) * top_k_weights[rows, place, None]
            answer.index_add_(0, rows, found.to(answer.dtype))
        return answer

    def nbytes(self) -> int:
        return sum(matrix.nbytes() for matrix in (*self.gate_up, *self.down))


def read_experts(module: Any, name: str, tensors: StoredTensors, dtype: torch.dtype, group_size: int) -> Experts:
    """Raises BadShard as `StoredTensors.read` does."""
    count, double, hidden = module.gate_up_proj.shape
    inner = double // 2
    gate_up, down = [], []
    for i in range(count):
        both = [f"{name}.{i}.{part}_proj.weight" for part in ("gate", "up")]
        gate_up.append(read_matrix(tensors, both, [(inner, hidden)] * 2, dtype, group_size))
        down.append(read_matrix(tensors, [f"{name}.{i}.down_proj.weight"], [(hidden, inner)], dtype, group_size))
    return Experts(gate_up, down, module.act_fn)

"""The forward pass by transformers' own modules: right for every architecture that is supported."""

from __future__ import annotations

import torch

from nodes.engines.decoder.attention import Pass
from nodes.engines.decoder.skeleton import Skeleton

__all__ = ["Generic"]


class Generic:
    """`forward` as in `Forward`."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._model = skeleton.model
        self._base = skeleton.base

    def forward(self, hidden: torch.Tensor, current: Pass, wanted: torch.Tensor | None) -> torch.Tensor:
        """`hidden` [rows, hidden size]. Returns hidden states of the same shape; where `wanted` (rows, at the last stage) is given, their scores [wanted, vocabulary]."""
        arguments = {
            "inputs_embeds": hidden[None],
            "position_ids": current.positions()[None],
            "use_cache": False,
            "splitnet_pass": current,
        }
        if wanted is not None and len(wanted):
            scores: torch.Tensor = self._model(**arguments, logits_to_keep=wanted).logits[0]
            return scores
        found: torch.Tensor = self._base(**arguments).last_hidden_state[0]
        return found

"""Versions of one small model, and where it may be cut."""

from __future__ import annotations

import functools

import torch
from small_models import Chain, captured, stages_by

from partitioner.graph import ModelGraph

__all__ = ["PLACES", "version"]

PLACES = {
    "ab": stages_by(a="linear relu", b="*"),
    "ac": stages_by(a="linear relu", c="*"),
    "bc": stages_by(b="linear relu", c="*"),
    "a": stages_by(a="*"),
}


@functools.cache
def version(number: int) -> ModelGraph:
    torch.manual_seed(100 + number)
    return captured(Chain(), torch.randn(2, 16))

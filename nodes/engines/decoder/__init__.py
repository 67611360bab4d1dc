"""Decoder language models with KV caches: the engine of shards of format "decoder". Importing this package does not import torch."""

from __future__ import annotations

from nodes.engines.decoder.base import StepEngine
from nodes.engines.decoder.steps import Sampling, Step

__all__ = ["Sampling", "Step", "StepEngine"]

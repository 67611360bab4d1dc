"""Decoder language models in the planner: read from config.json and safetensors, layer by layer; measured on nodes; planned for TTFT, TPOT, throughput; cut."""

from __future__ import annotations

"""Generating text at the ingress of a decoder model's deployment, and the steps of it on every stage."""

from __future__ import annotations

__all__: list[str] = []

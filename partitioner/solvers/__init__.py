"""Solvers: costs in, plans out. Pure; neither torch nor grpc."""

from __future__ import annotations

from partitioner.solvers.graphs import solve

__all__ = ["solve"]

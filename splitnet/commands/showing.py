"""What the commands share: tables, sizes, and files that say where nodes are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from splitnet.cluster import Cluster
from splitnet.plan import Plan

__all__ = ["print_table", "size_text", "where_of"]


def where_of(path: Path) -> Cluster | Plan:
    """A plan knows its nodes as a cluster does."""
    return Plan.load(path) if path.suffix == ".json" else Cluster.load(path)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size_text(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"

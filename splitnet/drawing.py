"""Finds what draws plans: the entry point `plan` of the group `splitnet.drawing`. The planner provides it; this package does not know it."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitnet.errors import MissingExtra

if TYPE_CHECKING:
    from splitnet.plan import Plan

__all__ = ["GROUP", "draw"]

GROUP = "splitnet.drawing"


def draw(plan: Plan, path: str | Path, **material: Any) -> None:
    """Draws `plan` into a file; `material` is what the one that draws takes besides. Raises MissingExtra where nothing here can."""
    for point in entry_points(group=GROUP, name="plan"):
        try:
            function = point.load()
        except ModuleNotFoundError as error:
            raise MissingExtra(f"drawing needs {error.name}, which is not installed", remedy="pip install 'splitnet[draw]'") from None
        function(plan, path, **material)
        return
    raise MissingExtra("nothing that draws plans is installed", remedy="pip install 'splitnet[draw]'")

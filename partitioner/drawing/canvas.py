"""A sheet to draw on, measured in points from its upper left corner; the colours and the letters that all pictures share.

matplotlib's file backends only: no window is ever opened, and nothing outside this package's figures is configured.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "ON_FILL",
    "PAPER",
    "WIDTH",
    "Sheet",
    "new_sheet",
    "save",
    "shortened",
    "stage_colour",
    "style",
    "text_width",
    "tint",
]

WIDTH = 310.0  #: of every sheet: a phone shows it a little larger than drawn, so that the smallest letters are legible
#: Wong, Points of view: Color blindness, Nature Methods 8 (2011): told apart by people with every kind of colour vision. Without black.
_PALETTE = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00")
INK, MUTED, GRID, PAPER = "#1f2328", "#5b636c", "#d4d8dd", "#fefefe"  # a page may replace these by those of its own theme
ON_FILL = "#101214"  # letters on a stage's colour: the same in every theme
_DPI = 220  # of PNG
_LETTER = 0.56  # an average letter's width in this font, as a share of its size


def stage_colour(index: int) -> str:
    """For the stage of this place in the plan; after seven they come again."""
    return _PALETTE[index % len(_PALETTE)]


def tint(colour: str, share: float) -> str:
    """The colour mixed with so much white."""
    parts = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in parts)


def text_width(text: str, size: float) -> float:
    """About how wide it will be."""
    return len(text) * size * _LETTER


def shortened(text: str, width: float, size: float) -> str:
    """The end of a text that is too long: a module path's end says more than its beginning."""
    room = max(int(width / (size * _LETTER)), 2)
    return text if len(text) <= room else "…" + text[len(text) - room + 1 :]


@dataclass(frozen=True)
class Sheet:
    """A part of a figure. Several sheets, one below the other, make one picture."""

    figure: Figure
    top: float  # of this sheet, from the figure's upper border
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes for a diagram at that place."""
        total = self.figure.get_figheight() * 72
        return self.figure.add_axes((left / WIDTH, 1 - (self.top + top + height) / total, width / WIDTH, height / total))

    def plane(self) -> Axes:
        """Axes as large as the sheet, invisible, whose unit is the point and whose y grows downwards."""
        axes = self.axes(0, 0, WIDTH, self.height)
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(self.height, 0)
        axes.axis("off")
        return axes


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for the time of drawing and saving; the caller's are put back."""
    import matplotlib

    settings: dict[str, Any] = {
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.7,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": PAPER,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "savefig.facecolor": PAPER,
        "svg.fonttype": "none",  # letters stay letters: they can be searched, read aloud, and scaled
        "svg.hashsalt": "splitnet",  # the same picture twice is the same file
        "text.color": INK,
        "text.parse_math": False,  # a name may hold a dollar sign
        "xtick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.color": MUTED,
        "ytick.labelcolor": INK,
    }
    with matplotlib.rc_context(settings):  # type: ignore[arg-type] # the stubs list every key as a literal
        yield


def new_sheet(height: float) -> Sheet:
    from matplotlib.figure import Figure

    return Sheet(Figure(figsize=(WIDTH / 72, height / 72)), 0.0, height)


def save(figure: Figure, kind: Literal["svg", "png"]) -> bytes:
    """The finished file. An SVG has neither a document type, which names an address outside, nor a date."""
    buffer = io.BytesIO()
    if kind == "png":
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        return buffer.getvalue()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return re.sub(rb"<!DOCTYPE.*?>\s*", b"", buffer.getvalue(), count=1, flags=re.DOTALL)


def corners(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """As matplotlib wants a line."""
    return [x for x, _ in points], [y for _, y in points]

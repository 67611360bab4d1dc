"""Latency against throughput: what plans there are to choose from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from partitioner.drawing.canvas import INK, MUTED, PAPER, WIDTH, Sheet, text_width
from partitioner.drawing.studies import Choice, front
from partitioner.drawing.words import Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Pareto"]

_PLANS, _ALONE, _CHOSEN = "#0072b2", "#e69f00", "#d55e00"
_LEFT, _RIGHT, _TOP, _BOTTOM = 36.0, 14.0, 22.0, 36.0
_HEIGHT = 230.0
_LETTERS = 8.0


@dataclass(frozen=True)
class Pareto:
    choices: tuple[Choice, ...]
    words: Words = field(default_factory=Words)

    @property
    def height(self) -> float:
        return _HEIGHT

    def paint(self, sheet: Sheet) -> None:
        width, height = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        axes = sheet.axes(_LEFT, _TOP, width, height)
        slowest = max(c.latency_s for c in self.choices)
        unit, factor = ("s", 1.0) if slowest >= 1 else ("ms", 1e3)
        xs = [c.latency_s * factor for c in self.choices]
        ys = [c.throughput_per_s for c in self.choices]
        x0, x1 = min(xs), max(xs)
        spread = (x1 - x0) or x1
        axes.set_xlim(max(0.0, x0 - 0.18 * spread), x1 + 0.2 * spread)
        axes.set_ylim(0, max(ys) * 1.18)
        best = front(self.choices)
        steps_x = [c.latency_s * factor for c in best]
        steps_y = [c.throughput_per_s for c in best]
        axes.step([*steps_x, axes.get_xlim()[1]], [*steps_y, steps_y[-1]], where="post", color=_PLANS, linewidth=1.4, zorder=2)
        for c, x, y in zip(self.choices, xs, ys, strict=True):
            marker, colour, size = ("*", _CHOSEN, 130) if c.chosen else ("D", _ALONE, 34) if c.alone else ("o", _PLANS, 34)
            axes.scatter(
                [x],
                [y],
                marker=marker,
                s=size,
                color=colour,
                edgecolor=INK if c.chosen else PAPER,
                linewidth=0.7,
                zorder=4 if c.chosen else 3,
            )
        axes.set_xlabel(f"{self.words.latency} ({unit})", size=9, labelpad=3)
        axes.tick_params(labelsize=8.5)
        axes.grid(zorder=0)
        axes.set_axisbelow(True)
        plane = sheet.plane()
        plane.text(6, 9, f"{self.words.one}s per second", size=9, va="center")
        self._label(plane, axes, xs, ys, best, width, height)

    def _label(
        self, plane: Axes, axes: Axes, xs: Sequence[float], ys: Sequence[float], best: Sequence[Choice], width: float, height: float
    ) -> None:
        """Each point's label where nothing else is; the least important ones may find no place, and stand in the table only."""
        (x0, x1), (_, y1) = axes.get_xlim(), axes.get_ylim()
        spots = [(_LEFT + (x - x0) / (x1 - x0) * width, _TOP + (1 - y / y1) * height) for x, y in zip(xs, ys, strict=True)]
        taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
        line = [spots[self.choices.index(c)] for c in best]
        for (xa, ya), (xb, yb) in itertools.pairwise([*line, (WIDTH - _RIGHT, line[-1][1])]):
            taken += [(xa, ya - 1, xb, ya + 1), (xb - 1, min(ya, yb), xb + 1, max(ya, yb))]
        order = sorted(
            range(len(spots)), key=lambda k: (not self.choices[k].chosen, not self.choices[k].alone, self.choices[k] not in best)
        )
        for k in order:
            text, (x, y) = self.choices[k].label, spots[k]
            wide = text_width(text, _LETTERS)
            for dx, dy in _places(wide):
                box = (x + dx - 1, y + dy - 4.8, x + dx + wide + 1, y + dy + 4.8)
                inside = box[0] >= _LEFT + 1 and box[2] <= WIDTH - 2 and box[1] >= _TOP - 4 and box[3] <= _TOP + height - 1
                if inside and not any(_overlap(box, other) for j, other in enumerate(taken) if j != k):
                    taken.append(box)
                    plane.text(
                        x + dx, y + dy, text, size=_LETTERS, va="center", color=INK if not self.choices[k].alone else MUTED, zorder=6
                    )
                    break


def _places(wide: float) -> list[tuple[float, float]]:
    """Where a label may stand, from its point: beside it, above, below, and then farther off."""
    near = [
        (8.0, 0.0),
        (-8 - wide, 0.0),
        (-wide / 2, -11.5),
        (-wide / 2, 11.5),
        (6.0, -10.0),
        (6.0, 10.0),
        (-6 - wide, -10.0),
        (-6 - wide, 10.0),
    ]
    return near + [(dx, dy) for dy in (-15.0, 15.0, -20.0, 20.0, -30.0, 30.0) for dx in (-wide / 2, 2.0, -2 - wide)]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

"""The best cut against bandwidth: what the objective becomes, and how far each node's share of the model reaches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from partitioner.drawing.canvas import INK, MUTED, ON_FILL, PAPER, WIDTH, Sheet, shortened, text_width, tint
from partitioner.drawing.studies import SweepPoint
from partitioner.drawing.words import Words
from splitnet.explain import bytes_text, seconds_text

__all__ = ["Sweep", "bandwidth_text", "figures"]

_LEFT, _RIGHT = 36.0, 14.0
_UPPER, _LOWER = 150.0, 120.0
_TOP, _BETWEEN, _BOTTOM = 20.0, 44.0, 52.0
_BEST = "#0072b2"


@dataclass(frozen=True)
class Sweep:
    objective: str
    colours: Mapping[str, str]  # of the cluster's nodes: each keeps its own over all bandwidths
    points: tuple[SweepPoint, ...]
    words: Words = field(default_factory=Words)

    @property
    def height(self) -> float:
        return _TOP + _UPPER + _BETWEEN + _LOWER + _BOTTOM

    def paint(self, sheet: Sheet) -> None:
        self._paint_objective(sheet)
        self._paint_cuts(sheet)

    def _paint_objective(self, sheet: Sheet) -> None:
        width = WIDTH - _LEFT - _RIGHT
        axes = sheet.axes(_LEFT, _TOP, width, _UPPER)
        bits = [p.bandwidth_bits_per_s / 1e6 for p in self.points]
        alone: dict[float, list[str]] = {}
        for a in self.points[0].alternatives:
            if a.fits:
                value = 1.0 / a.throughput_per_s if self.objective == "throughput" else a.latency_s
                alone.setdefault(round(value, 9), []).append(a.node)
        worst = max([*alone, *(p.objective_s for p in self.points)])
        unit, factor = ("s", 1.0) if worst >= 1 else ("ms", 1e3)
        values = [p.objective_s * factor for p in self.points]
        axes.set_xscale("log")
        borders = _borders(bits)
        axes.set_xlim(borders[0], borders[-1])
        top = worst * factor * 1.22
        axes.set_ylim(0, top)
        axes.plot(bits, values, color=_BEST, linewidth=1.8, marker="o", markersize=3.5, zorder=3, clip_on=False)
        taken: list[float] = []
        for value in sorted(alone, reverse=True):
            y = value * factor
            axes.axhline(y, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
            spot = y / top * _UPPER + 6  # above its line, unless another label is there
            if all(abs(spot - other) > 10 for other in taken):
                taken.append(spot)
                names = ", ".join(alone[value])
                axes.text(
                    borders[-1], spot / _UPPER * top, shortened(f"{names} alone", width / 2, 8), size=8, color=INK, ha="right", va="center", zorder=5,
                    bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.3, "alpha": 0.8},
                )  # fmt: skip
        self._bandwidth_axis(sheet, axes, labels=False)
        what = f"time per {self.words.one}, pipeline full" if self.objective == "throughput" else self._quick
        plane = sheet.plane()
        plane.text(6, 9, f"{what} ({unit})", size=9, va="center")
        plane.plot([WIDTH - 92, WIDTH - 76], [9, 9], color=_BEST, linewidth=1.8, marker="o", markersize=3.5)
        plane.text(WIDTH - 72, 9, "the best plan", size=8, va="center")

    @property
    def _quick(self) -> str:
        return "latency" if self.words == Words() else self.words.latency

    def _paint_cuts(self, sheet: Sheet) -> None:
        axes = sheet.axes(_LEFT, _TOP + _UPPER + _BETWEEN, WIDTH - _LEFT - _RIGHT, _LOWER)
        axes.set_xscale("log")
        borders = _borders([p.bandwidth_bits_per_s / 1e6 for p in self.points])
        axes.set_xlim(borders[0], borders[-1])
        axes.set_ylim(1, 0)
        per_decade = (WIDTH - _LEFT - _RIGHT) / len(self.points)
        for point, (left, right) in zip(self.points, itertools.pairwise(borders), strict=True):
            start = 0.0
            for share in point.shares:
                colour = self.colours[share.node]
                axes.bar(
                    left, share.end - start, right - left, bottom=start, align="edge", color=tint(colour, 0.25), edgecolor=PAPER, linewidth=0.5
                )  # fmt: skip
                name = shortened(share.node, per_decade - 2, 7.5)
                if (share.end - start) * _LOWER > 10 and len(name) == len(share.node):
                    axes.text((left * right) ** 0.5, (start + share.end) / 2, name, size=7.5, color=ON_FILL, ha="center", va="center")
                start = share.end
        self._bandwidth_axis(sheet, axes, labels=True)
        axes.set_yticks([0, 0.5, 1], ["start", "half", "end"], size=8.5)
        axes.tick_params(axis="y", length=0)
        plane = sheet.plane()
        plane.text(6, _TOP + _UPPER + _BETWEEN - 11, "which node computes which part of the model", size=9, va="center")
        used = [node for node in self.colours if any(s.node == node for p in self.points for s in p.shares)]
        x, y = 6.0, self.height - 9
        for node in used:
            name = shortened(node, 90, 8)
            if x + 16 + text_width(name, 8) > WIDTH - 4:
                break
            plane.fill([x, x + 10, x + 10, x], [y - 4, y - 4, y + 4, y + 4], color=tint(self.colours[node], 0.25), linewidth=0)
            plane.text(x + 14, y, name, size=8, va="center")
            x += 24 + text_width(name, 8)

    @staticmethod
    def _bandwidth_axis(sheet: Sheet, axes: object, *, labels: bool) -> None:
        from matplotlib.axes import Axes
        from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

        assert isinstance(axes, Axes)
        low, high = axes.get_xlim()
        ticks = [t for t in (1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if low <= t <= high * 1.001]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{t:g}" for t in ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelsize=8.5)
        axes.grid(zorder=0)
        axes.set_axisbelow(True)
        if labels:
            axes.set_xlabel("bandwidth of every link (Mbit/s)", size=9, labelpad=2)


def _borders(centres: list[float]) -> list[float]:
    """Half way between neighbours, on a logarithmic scale."""
    if len(centres) == 1:
        return [centres[0] / 2, centres[0] * 2]
    inner = [(a * b) ** 0.5 for a, b in itertools.pairwise(centres)]
    return [centres[0] ** 2 / inner[0], *inner, centres[-1] ** 2 / inner[-1]]


def bandwidth_text(bits_per_s: float) -> str:
    return f"{bits_per_s / 1e6:.3g} Mbit/s"


def figures(objective: str, points: Sequence[SweepPoint]) -> list[tuple[str, ...]]:
    """The same as a table: bandwidth, the objective's figure, the nodes in order, the bytes that they send."""
    return [
        (
            bandwidth_text(p.bandwidth_bits_per_s),
            f"{1 / p.objective_s:.3g} /s" if objective == "throughput" else seconds_text(p.objective_s),
            " → ".join(s.node for s in p.shares),
            bytes_text(p.sent_bytes),
        )
        for p in points
    ]

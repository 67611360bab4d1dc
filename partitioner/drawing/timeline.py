"""Who works when: the simulator's intervals, a row per node and per link."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partitioner.constants import Goal, codec_figures, machines, outside_bytes, overheads
from partitioner.cost import CodecFigures
from partitioner.drawing.canvas import INK, MUTED, ON_FILL, WIDTH, Sheet, stage_colour, text_width, tint
from partitioner.drawing.words import words_of
from partitioner.simulation import Interval, Simulation, simulate
from splitnet.cluster import Cluster
from splitnet.explain import seconds_text
from splitnet.plan import CLIENT, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from partitioner.profiling import Profile

__all__ = ["Timeline", "timeline"]

_NARROWEST, _WIDEST, _RIGHT = 30.0, 100.0, 32.0  # margins: room for the names
_NAMES = 8.5
_ROW, _BAR = 17.0, 12.0
_TITLE, _AXIS = 18.0, 34.0
_LEGEND = 18.0
_MOST_ROWS = 24
_SHOWN = 5  # requests of the full pipeline
_WINDOWS = 4  # times max_in_flight: requests that are played, for the shares of time
_CLIENT_COLOUR = "#9aa3ac"


@dataclass(frozen=True)
class _Part:
    title: str
    played: Simulation
    end_s: float


@dataclass(frozen=True)
class Timeline:
    plan: Plan
    rows: tuple[str, ...]  # nodes and links, in the order of the data's way
    left_out: int
    unknown_codecs: tuple[str, ...]  # without figures: played as if they cost nothing
    parts: tuple[_Part, ...]

    @property
    def height(self) -> float:
        return _LEGEND + len(self.parts) * (_TITLE + len(self.rows) * _ROW + _AXIS)

    @property
    def left(self) -> float:
        return min(_WIDEST, max(_NARROWEST, *(text_width(_name(row), _NAMES) + 8 for row in self.rows)))

    @property
    def width(self) -> float:
        return WIDTH - self.left - _RIGHT

    def paint(self, sheet: Sheet) -> None:
        _legend(sheet.plane(), self.plan, {interval.kind for part in self.parts for interval in part.played.intervals})
        tall = len(self.rows) * _ROW
        for k, part in enumerate(self.parts):
            top = _LEGEND + k * (_TITLE + tall + _AXIS) + _TITLE
            self._paint_part(sheet.axes(self.left, top, self.width, tall), part, shares=k > 0)

    def _paint_part(self, axes: Axes, part: _Part, *, shares: bool) -> None:
        place = {row: k for k, row in enumerate(self.rows)}
        stages = {stage.name: k for k, stage in enumerate(self.plan.stages)}
        unit, factor = ("s", 1.0) if part.end_s >= 1 else ("ms", 1e3) if part.end_s >= 1e-3 else ("µs", 1e6)
        axes.set_xlim(0, part.end_s * factor)
        axes.set_ylim(len(self.rows), 0)
        points = self.width / part.end_s  # per second
        for interval in part.played.intervals:
            if interval.place in place and interval.start_s < part.end_s:
                self._bar(axes, interval, place[interval.place], factor, points, stages, part.end_s)
        axes.set_yticks([k + 0.5 for k in range(len(self.rows))], [_name(row) for row in self.rows], size=_NAMES)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8.5)
        axes.set_xlabel(unit, size=8.5, labelpad=1)
        axes.grid(axis="x", zorder=0)
        axes.set_axisbelow(True)
        axes.set_title(part.title, size=9, loc="left", x=(6 - self.left) / self.width, pad=5)
        if shares:
            axes.set_title("busy", size=8, loc="right", x=1.0 + (_RIGHT - 6) / self.width, pad=5, color=MUTED)
            # While it is full: from the first answer until the last request is let in.
            start, until = part.played.requests[0].done_s, part.played.requests[-1].admitted_s
            busy = part.played.busy_s(start, until)
            for row, k in place.items():
                axes.text(
                    1.01,
                    k + 0.5,
                    f"{busy.get(row, 0.0) / (until - start):.0%}",
                    size=8,
                    color=INK,
                    va="center",
                    transform=axes.get_yaxis_transform(),
                )

    def _bar(
        self, axes: Axes, interval: Interval, row: int, factor: float, points: float, stages: Mapping[str, int], end_s: float
    ) -> None:  # fmt: skip
        colour = _CLIENT_COLOUR if interval.stage == CLIENT else stage_colour(stages[interval.stage])
        looks: dict[str, dict[str, Any]] = {
            "accept": {"facecolor": _CLIENT_COLOUR, "edgecolor": "#ffffff"},
            "compute": {"facecolor": colour, "edgecolor": "#ffffff"},
            "encode": {"facecolor": "#ffffff", "edgecolor": colour, "hatch": "////"},
            "decode": {"facecolor": "#ffffff", "edgecolor": colour, "hatch": "\\\\\\\\"},
            "transfer": {"facecolor": tint(colour, 0.55), "edgecolor": colour},
        }
        start, until = interval.start_s, min(interval.end_s, end_s)
        thin = (until - start) * points < 4
        line = 0.0 if thin and interval.kind == "compute" else 0.3 if thin else 0.6  # a border must not hide what it surrounds
        axes.barh(
            row + 0.5, (until - start) * factor, left=start * factor, height=_BAR / _ROW, linewidth=line, zorder=2, **looks[interval.kind]
        )
        number = str(interval.request + 1)
        if (until - start) * points > text_width(number, 7.5) + 3:
            axes.text((start + until) / 2 * factor, row + 0.52, number, size=7.5, color=ON_FILL, ha="center", va="center", zorder=3)


def timeline(plan: Plan, cluster: Cluster | None, profile: Profile | None = None) -> Timeline:
    """One request alone, and the beginning of a full pipeline, in which computing takes as long as the profile says of nodes that are kept busy
    (without one: as long as alone). Without a cluster for a plan on one node. Raises NoPlan where a link is missing."""
    used = [cluster.node(node.name) for node in plan.nodes] if cluster else []
    links = {(link.source, link.target): link for link in cluster.links} if cluster else {}
    shared = machines(cluster) if cluster else ()
    unknown = tuple(sorted({t.codec for t in plan.transfers} - set(codec_figures(used))))

    def play(goal: Goal, requests: int) -> Simulation:
        figures = codec_figures(used, goal, shared) | {name: CodecFigures() for name in unknown}
        spent = overheads(used, goal, shared, outside_bytes(plan.transfers))
        seconds = _busy_s(plan, cluster, profile) if goal == "throughput" else None
        return simulate(plan, links, seconds=seconds, codecs=figures, overheads=spent, machines=shared, requests=requests)

    alone, full = play("latency", 1), play("throughput", max(_WINDOWS * plan.max_in_flight, _SHOWN))
    rows = _rows(plan, full)
    left_out = 0
    if len(rows) > _MOST_ROWS:
        busy = full.busy_s()
        kept = set(sorted(rows, key=lambda row: -busy[row])[:_MOST_ROWS])
        left_out = len(rows) - len(kept)
        rows = [row for row in rows if row in kept]
    one = words_of(plan).one
    done = sorted(request.done_s for request in full.requests)
    parts = (
        _Part(f"one {one} alone: {seconds_text(alone.requests[0].latency_s)}", alone, alone.end_s),
        _Part(f"pipeline full: {full.throughput_per_s:.3g} {one}s per second", full, done[min(_SHOWN, len(done)) - 1]),
    )
    return Timeline(plan, tuple(rows), left_out, unknown, parts)


def _busy_s(plan: Plan, cluster: Cluster | None, profile: Profile | None) -> dict[str, float]:
    """By stage. A plan has the seconds of a node with pauses."""
    if cluster is None or profile is None:
        return {}
    return {stage.name: stage.seconds * profile.on(cluster.node(stage.node)).sustained for stage in plan.stages}


def _rows(plan: Plan, played: Simulation) -> list[str]:
    """The places that work at all: each node, then the links that leave it."""
    used = dict.fromkeys(interval.place for interval in played.intervals)
    nodes = list(dict.fromkeys(stage.node for stage in plan.stages))
    order: list[str] = []
    for node in nodes:
        order += [place for place in used if place == node]
        order += sorted((place for place in used if place.startswith(f"{node}->")), key=lambda p: _rank(nodes, p))
    return order


def _rank(nodes: Sequence[str], link: str) -> int:
    return nodes.index(link.split("->")[1])


def _name(row: str) -> str:
    """Of a node, or of a link with both its ends."""
    ends = row.split("->")
    room = int((_WIDEST - 8) / text_width("x", _NAMES)) - 3 * (len(ends) - 1)
    half = room // len(ends)
    spare = sum(max(0, half - len(end)) for end in ends)  # what a short name leaves to the other
    return " → ".join(_start(end, half + spare) for end in ends)


def _start(name: str, room: int) -> str:
    return name if len(name) <= room else name[: room - 1] + "…"


def _legend(axes: Axes, plan: Plan, kinds: Collection[str]) -> None:
    """What the bars that there are mean; the stages' colours are those of the model's picture. A message costs a node time without a codec, too."""
    from matplotlib.patches import Rectangle

    x, colour = 6.0, stage_colour(0)
    codecs = any(transfer.codec != "raw" for transfer in plan.transfers)
    items = {
        "accept": ("accepts", _CLIENT_COLOUR, None),
        "compute": ("computes", colour, None),
        "encode": ("encodes" if codecs else "hands over", "#ffffff", "////"),
        "transfer": ("sends", tint(colour, 0.55), None),
        "decode": ("decodes" if codecs else "takes in", "#ffffff", "\\\\\\\\"),
    }
    for name, face, hatch in (items[kind] for kind in items if kind in kinds):
        edge = face if face == _CLIENT_COLOUR else colour
        axes.add_patch(Rectangle((x, 3), 14, 9, facecolor=face, edgecolor=edge, hatch=hatch, linewidth=0.6))
        axes.text(x + 18, 8, name, size=8, va="center")
        x += 24 + text_width(name, 8)

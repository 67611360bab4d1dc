"""The model as the plan divides it: a panel per stage with its blocks, and the bytes on every cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitioner.drawing.blocks import Block, BlockGraph, group
from partitioner.drawing.canvas import INK, MUTED, ON_FILL, PAPER, WIDTH, Sheet, corners, shortened, stage_colour, text_width, tint
from partitioner.drawing.rows import Drawing, arrange
from partitioner.profiling import Profile
from splitnet.explain import bytes_text, seconds_text
from splitnet.plan import CLIENT, Plan, StageSpec, Transfer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ModelPicture", "model_picture"]

_BLOCKS = 24  # in all stages together, about
_MARGIN = 6.0
_HEADER, _PAD = 31.0, 7.0
_BLOCK_HEIGHT = 27.0
_NARROW = 82.0  # a block needs this much
_PANEL = 95.0  # and a panel this much
_CLIENT_HEIGHT = 20.0


@dataclass(frozen=True)
class _Panel:
    """A stage, or the client's end (`stage` None)."""

    title: str
    stage: StageSpec | None
    index: int
    blocks: BlockGraph

    def inner(self, width: float) -> Drawing:
        columns = max(1, int((width - 2 * _PAD) // _NARROW))
        return arrange(
            len(self.blocks.blocks),
            self.blocks.edges,
            width - 2 * _PAD,
            height_of=lambda _b, _w: _BLOCK_HEIGHT,
            columns=columns,
            widest=196.0,
        )

    def height(self, width: float) -> float:
        if self.stage is None:
            return _CLIENT_HEIGHT
        return _HEADER + self.inner(width).height + _PAD


@dataclass(frozen=True)
class ModelPicture:
    """Laid out, and ready to be painted."""

    panels: tuple[_Panel, ...]
    transfers: tuple[Transfer, ...]
    labels: tuple[str, ...]
    drawing: Drawing

    @property
    def height(self) -> float:
        return self.drawing.height + 2 * _MARGIN

    def paint(self, sheet: Sheet) -> None:
        axes = sheet.plane()
        for transfer, label, line in zip(self.transfers, self.labels, self.drawing.lines, strict=True):
            points = [(x + _MARGIN, y + _MARGIN) for x, y in line.points]
            _arrow(axes, points, INK, 1.3 if transfer.source and transfer.target else 0.9)
            x, y = line.label
            axes.text(
                x + _MARGIN, y + _MARGIN, label, size=8, va="center", color=INK, zorder=5,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
        for panel, box in zip(self.panels, self.drawing.boxes, strict=True):
            _paint_panel(axes, panel, box.x + _MARGIN, box.y + _MARGIN, box.width, box.height)


def model_picture(plan: Plan, profile: Profile | None) -> ModelPicture:
    """With a profile, each stage shows its modules; without, where it begins and ends."""
    panels = [_Panel(f"client, at node {plan.ingress.name}", None, 0, BlockGraph((), ()))]
    limit = max(2, _BLOCKS // len(plan.stages)) if len(plan.stages) <= _BLOCKS // 2 else 1
    seconds = _seconds(plan, profile)
    for i, stage in enumerate(plan.stages):
        blocks = group(profile.structure, stage.operators, seconds[stage.name], limit) if profile else _ends(stage)
        panels.append(_Panel(stage.name, stage, i, blocks))
    place = {stage.name: i + 1 for i, stage in enumerate(plan.stages)}
    back = any(t.target == CLIENT for t in plan.transfers)
    if back:
        panels.append(_Panel(f"client, at node {plan.ingress.name}", None, 0, BlockGraph((), ())))
    edges = [(place.get(t.source, 0), place.get(t.target, len(panels) - 1)) for t in plan.transfers]
    home = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.ingress.name}
    labels = [_label(t, home) for t in plan.transfers]
    drawing = arrange(
        len(panels),
        edges,
        WIDTH - 2 * _MARGIN,
        height_of=lambda k, w: panels[k].height(w),
        columns=int((WIDTH - 2 * _MARGIN) // _PANEL),
        label_width=lambda e: text_width(labels[e], 8),
    )
    return ModelPicture(tuple(panels), plan.transfers, tuple(labels), drawing)


def _seconds(plan: Plan, profile: Profile | None) -> dict[str, dict[str, float]]:
    """Of each operator in each stage: the profile's shares of what the plan says of the stage."""
    if profile is None:
        return {stage.name: {} for stage in plan.stages}
    here = dict(zip((v.name for v in profile.structure.vertices), profile.columns[""].seconds, strict=True))
    found = {}
    for stage in plan.stages:
        total = sum(here.get(name, 0.0) for name in stage.operators)
        scale = stage.seconds / total if total else 0.0
        found[stage.name] = {name: here.get(name, 0.0) * scale for name in stage.operators}
    return found


def _ends(stage: StageSpec) -> BlockGraph:
    names = stage.operators or ("",)
    first, last = stage.first or names[0], stage.last or names[-1]
    label = first if first == last else f"{first} … {last}"
    return BlockGraph((Block(label, stage.operators, stage.seconds, stage.param_bytes),), ())


def _label(transfer: Transfer, home: Mapping[str, str]) -> str:
    a, b = home[transfer.source], home[transfer.target]
    way = f"{a} → {b}" if a != b else f"within {a}"
    codec = "" if transfer.codec == "raw" else f", {transfer.codec}"
    return f"{bytes_text(transfer.bytes)}, {way}{codec}"


def count_text(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _paint_panel(axes: Axes, panel: _Panel, x: float, y: float, width: float, height: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    def rounded(x: float, y: float, w: float, h: float, face: str, edge: str, line: float) -> None:
        axes.add_patch(
            FancyBboxPatch((x + 2, y + 2), w - 4, h - 4, boxstyle="round,pad=2", facecolor=face, edgecolor=edge, linewidth=line, zorder=3)
        )

    if panel.stage is None:
        rounded(x, y, width, height, PAPER, MUTED, 0.8)
        axes.text(
            x + width / 2, y + height / 2, shortened(panel.title, width - 2 * _PAD, 8.5), size=8.5, ha="center", va="center", zorder=4
        )
        return
    colour = stage_colour(panel.index)
    rounded(x, y, width, height, tint(colour, 0.62), colour, 1.4)
    stage = panel.stage
    title = shortened(f"{stage.name} on {stage.node}", width - 2 * _PAD, 9.5)
    facts = f"{seconds_text(stage.seconds)}, {bytes_text(stage.param_bytes)} of parameters, {count_text(len(stage.operators), 'operator')}"
    if text_width(facts, 8) > width - 2 * _PAD:
        facts = f"{seconds_text(stage.seconds)}, {bytes_text(stage.param_bytes)}"
    axes.text(x + _PAD, y + 10, title, size=9.5, weight="bold", color=ON_FILL, va="center", zorder=4)
    axes.text(x + _PAD, y + 22, facts, size=8, color=ON_FILL, va="center", zorder=4)
    inner = panel.inner(width)
    for line in inner.lines:
        _arrow(axes, [(px + x + _PAD, py + y + _HEADER) for px, py in line.points], ON_FILL, 0.7, zorder=4)
    for block, box in zip(panel.blocks.blocks, inner.boxes, strict=True):
        bx, by = x + _PAD + box.x, y + _HEADER + box.y
        rounded(bx, by, box.width, box.height, "#ffffff", colour, 0.8)
        axes.text(
            bx + box.width / 2, by + 9, shortened(block.label, box.width - 6, 8), size=8, color=ON_FILL, ha="center", va="center", zorder=5
        )
        facts = f"{seconds_text(block.seconds)}, {bytes_text(block.param_bytes)}"
        axes.text(bx + box.width / 2, by + 19, facts, size=7.6, color="#3c4248", ha="center", va="center", zorder=5)


def _arrow(axes: Axes, points: list[tuple[float, float]], colour: str, width: float, zorder: float = 2) -> None:
    xs, ys = corners(points)
    axes.plot(xs, ys, color=colour, linewidth=width, solid_joinstyle="round", zorder=zorder)
    (x, y), size = points[-1], 2.2 + width
    axes.fill([x, x - size * 0.7, x + size * 0.7], [y, y - size * 1.5, y - size * 1.5], color=colour, linewidth=0, zorder=zorder)

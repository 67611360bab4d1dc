"""Which pictures there are of a plan, and how they become one file."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from partitioner.drawing.canvas import GRID, INK, MUTED, PAPER, Sheet, new_sheet, save, stage_colour, style
from partitioner.drawing.model_graph import model_picture
from partitioner.drawing.pareto import Pareto
from partitioner.drawing.studies import Planner, choices, front, left_out, stage_counts, sweep
from partitioner.drawing.sweeping import Sweep, figures
from partitioner.drawing.timeline import timeline
from partitioner.drawing.words import words_of
from partitioner.profiling import Profile
from splitnet.cluster import Cluster
from splitnet.explain import explain, seconds_text
from splitnet.plan import Plan

__all__ = ["Pictures", "compose", "html_page", "pictures"]

_SWEEP_MBIT_S = (1, 1.6, 2.5, 4, 6.3, 10, 16, 25, 40, 63, 100, 160, 250, 400, 630, 1000)
_TITLE, _LINE, _GAP = 24.0, 12.0, 16.0
_HEAD = 44.0
_LETTERS_PER_LINE = 60


class Picture(Protocol):
    @property
    def height(self) -> float: ...

    def paint(self, sheet: Sheet) -> None: ...


@dataclass(frozen=True)
class Panel:
    """A picture with its title and a sentence or two; `table`: the same as figures, its first row the head."""

    title: str
    note: str
    picture: Picture
    table: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Pictures:
    panels: tuple[Panel, ...]
    left_out: tuple[str, ...]


def pictures(plan: Plan, profile: Profile | None, cluster: Cluster | None, planner: Planner | None) -> Pictures:
    """All that can be drawn of what is there."""
    left_out: list[str] = []
    panels = [Panel("The model, cut", _model_note(plan, profile), model_picture(plan, profile))]
    if profile is None:
        left_out.append("The stages' insides need the profile.")
    spread = len({stage.node for stage in plan.stages}) > 1
    if cluster is not None or not spread:
        times = timeline(plan, cluster, profile)
        more = f" The {times.left_out} rows that work least are left out." if times.left_out else ""
        more += (
            f" Nobody measured the codec {' and '.join(times.unknown_codecs)}: shown as if it took no time." if times.unknown_codecs else ""
        )
        note = (
            f"As the simulator plays it. The number on a bar is the {words_of(plan).one}'s; a row is a node, or a link from one to another."
        )
        panels.append(Panel("Who works when", note + more, times))
    else:
        left_out.append("The timeline needs the cluster: its links say how long sending takes.")
    if profile is not None and cluster is not None:
        panels += _comparisons(plan, profile, cluster, planner)
    else:
        left_out.append("What else could be planned, and the best cut for each bandwidth, need the profile and the cluster.")
    return Pictures(tuple(panels), tuple(left_out))


def _model_note(plan: Plan, profile: Profile | None) -> str:
    batch = " for one token" if plan.generation else f" for a batch of {plan.prediction.batch}" if plan.prediction else ""
    what = "Blocks are modules, with the time that they take and their parameters; a" if profile else "A"
    masks = " Masks, sizes and other values that each stage makes for itself are not shown." if profile else ""
    return f"{what} line between stages is a cut, with the bytes that cross it{batch}, before any codec.{masks}"


def _comparisons(plan: Plan, profile: Profile, cluster: Cluster, planner: Planner | None) -> list[Panel]:
    if planner is None:
        from partitioner.planning import plan as best_plan  # the solvers are needed for nothing else here

        planner = best_plan
    found = choices(plan, profile, cluster, planner)
    counts = stage_counts(profile, cluster)
    stages = "every number of" if counts == list(range(2, len(cluster.nodes) + 1)) else ", ".join(map(str, counts))
    not_compared, not_swept = left_out(profile, cluster)
    best = front(found)
    words = words_of(plan)
    rows = [("", "latency" if words.one == "request" else words.latency, f"{words.one}s/s", "")]
    rows += [(c.label, seconds_text(c.latency_s), f"{c.throughput_per_s:.3g}", "best of its kind" if c in best else "") for c in found]
    panels = [
        Panel(
            "What there is to choose from",
            f"Each point is a plan: the best for {words.quick} and the best for throughput with {stages} stages, and each node alone; "
            f"of those within 2% of each other, one. On the line are those that no other beats in both.{not_compared}",
            Pareto(tuple(found), words),
            tuple(rows),
        )
    ]
    points = sweep(plan, profile, cluster, planner, [m * 1e6 for m in _SWEEP_MBIT_S]) if len(cluster.nodes) > 1 else []
    if points:
        panels.append(
            Panel(
                "The best cut against bandwidth",
                f"Planned anew, for {plan.objective}, with every link at that bandwidth and its latency as it is. Where the line lies on a "
                f"node's own, splitting would not help.{not_swept}",
                Sweep(plan.objective, node_colours(plan, cluster), tuple(points), words),
                (("bandwidth", "best", "nodes in order", "sent"), *figures(plan.objective, points)),
            )
        )
    return panels


def node_colours(plan: Plan, cluster: Cluster) -> dict[str, str]:
    """A node of the plan has the colour of its first stage there; the others get those that are left."""
    first: dict[str, int] = {}
    for k, stage in enumerate(plan.stages):
        first.setdefault(stage.node, k)
    free = len(plan.stages)
    colours = {}
    for node in cluster.nodes:
        if node.name not in first:
            first[node.name], free = free, free + 1
        colours[node.name] = stage_colour(first[node.name])
    return colours


# ------------------------------------------------------------------------------------------------------------- one SVG or PNG


def compose(plan: Plan, found: Pictures, kind: Literal["svg", "png"]) -> bytes:
    """All panels, one below the other."""
    notes = [_wrapped(panel.note) for panel in found.panels]
    last = _wrapped(" ".join(found.left_out))
    heights = [_TITLE + len(note) * _LINE + 6 + panel.picture.height + _GAP for panel, note in zip(found.panels, notes, strict=True)]
    total = _HEAD + sum(heights) + (len(last) * _LINE + _GAP if last else 0)
    with style():
        sheet = new_sheet(total)
        plane = sheet.plane()
        plane.text(6, 14, plan.model[:60], size=13, weight="bold", va="center")
        plane.text(6, 31, _summary(plan), size=9, va="center", color=INK)
        y = _HEAD
        for panel, note, height in zip(found.panels, notes, heights, strict=True):
            plane.text(6, y + 10, panel.title, size=11, weight="bold", va="center")
            _lines(sheet, note, y + _TITLE)
            top = y + _TITLE + len(note) * _LINE + 6
            panel.picture.paint(Sheet(sheet.figure, top, panel.picture.height))
            y += height
        _lines(sheet, last, y)
        return save(sheet.figure, kind)


def _lines(sheet: Sheet, lines: Sequence[str], top: float) -> None:
    plane = sheet.plane()
    for k, line in enumerate(lines):
        plane.text(6, top + k * _LINE, line, size=8, va="center", color=MUTED)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _LETTERS_PER_LINE)


def _summary(plan: Plan) -> str:
    p = plan.prediction
    stages = f"{len(plan.stages)} stage{'s' if len(plan.stages) > 1 else ''}"
    if p is None:
        return f"{stages}, for {plan.objective}"
    return f"{stages}, for {plan.objective}: {seconds_text(p.latency_s)}, {p.throughput_per_s:.3g} {words_of(plan).one}s/s predicted"


# ---------------------------------------------------------------------------------------------------------------------- a page

_CSS = """
:root { --ink: #1f2328; --muted: #5b636c; --grid: #d4d8dd; --paper: #fefefe; --page: #f3f4f6; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --muted: #a3abb4; --grid: #3a4048; --paper: #1c2026; --page: #121417; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 12px; background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 560px; margin: 0 auto; }
h1 { font-size: 1.35rem; margin: 4px 0; overflow-wrap: anywhere; }
h2 { font-size: 1.08rem; margin: 0 0 4px; }
p { margin: 0 0 8px; }
section { background: var(--paper); border: 1px solid var(--grid); border-radius: 10px; padding: 12px 6px; margin: 12px 0; }
section > h2, section > p { padding: 0 4px; }
section > p { color: var(--muted); font-size: .86rem; }
svg { display: block; width: 100%; height: auto; }
dl { display: flex; flex-wrap: wrap; gap: 8px; margin: 10px 0; }
dl div { flex: 1 1 106px; background: var(--paper); border: 1px solid var(--grid); border-radius: 10px; padding: 6px 8px; }
dl div:nth-child(6) { flex-basis: 100%; }
dt { color: var(--muted); font-size: .82rem; }
dd { margin: 0; font-size: .94rem; font-weight: 600; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: 6px 4px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 10px 3px 4px; border-bottom: 1px solid var(--grid); }
pre { font-size: .78rem; line-height: 1.35; margin: 0; padding: 4px; }
""".strip()


def html_page(plan: Plan, found: Pictures) -> bytes:
    """One file: pictures inline, no script, and nothing to be fetched from elsewhere."""
    sections = []
    for number, panel in enumerate(found.panels, 1):
        table = _details("As figures", _table(panel.table)) if panel.table else ""
        sections.append(
            f'<section>\n<h2>{_text(panel.title)}</h2>\n<p>{_text(panel.note)}</p>\n<div role="img" aria-label="{_text(panel.title)}">'
            f"{_inline(panel.picture, number)}</div>\n{table}</section>"
        )
    left_out = f"<section><p>{_text(' '.join(found.left_out))}</p></section>" if found.left_out else ""
    everything = _details("Everything, in words and figures", f"<pre>{_text(explain(plan))}</pre>")
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(plan.model)}: the plan</title>
<style>
{_CSS}
</style>
</head>
<body>
<main>
<h1>{_text(plan.model)}</h1>
{_headline(plan)}
{chr(10).join(sections)}
{left_out}
<section>{everything}</section>
</main>
</body>
</html>
"""
    return page.encode()


def _headline(plan: Plan) -> str:
    facts = [("stages", str(len(plan.stages))), ("nodes", str(len({s.node for s in plan.stages}))), ("made for", plan.objective)]
    if p := plan.prediction:
        facts += [("latency", seconds_text(p.latency_s)), ("throughput", f"{p.throughput_per_s:.3g} /s")]
        facts += [("bottleneck", p.bottleneck.replace("->", " → "))] if p.bottleneck else []
    return "<dl>" + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts) + "</dl>"


def _inline(picture: Picture, number: int) -> str:
    """As an element of a page: fluid, in the page's colours and letters, its ids its own."""
    with style():
        sheet = new_sheet(picture.height)
        picture.paint(sheet)
        text = save(sheet.figure, "svg").decode()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    rest = re.sub(r'\bid="', f'id="p{number}-', rest)
    rest = re.sub(r'(url\(#|href="#)', rf"\g<1>p{number}-", rest)
    for colour, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")):
        rest = rest.replace(colour, f"var(--{name})")
    return f"{head}>{rest.replace(_FONT, 'system-ui, sans-serif')}"


_FONT = "'DejaVu Sans'"


def _details(title: str, content: str) -> str:
    return f'<details><summary>{_text(title)}</summary><div class="wide">{content}</div></details>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [
        "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)
    ]
    return "<table><tr>" + "</tr>\n<tr>".join([head, *body]) + "</tr></table>"


def _text(text: str) -> str:
    return html.escape(text)

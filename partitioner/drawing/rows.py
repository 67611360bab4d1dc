"""Boxes in rows, and lines between them at right angles. Pure geometry: y grows downwards, all in points.

A box stands below everything that it depends on (longest path); boxes of a row are ordered by where their neighbours stand. A line that passes other rows
goes round them through a gutter. Every line with a label has a track of its own between two rows, so that labels never
lie on each other. (Sugiyama, Tagawa, Toda: Methods for Visual Understanding of Hierarchical System Structures, 1981, without its dummy vertices.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Box", "Drawing", "Line", "arrange"]

_GAP_X = 8.0
_LANE = 7.0  # width of a lane in a gutter
_HEAD = 7.0  # room for an arrow's head and the start of a line
_STRAIGHT = 1.0  # ends closer than this are above each other
_NEARLY = 7.0  # and ends closer than this are put there
_TRACK, _LABEL = 5.0, 12.0  # heights


@dataclass(frozen=True, slots=True)
class Box:
    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True, slots=True)
class Line:
    """`points` from the lower border of one box to the upper border of another. `label`: where its label goes (left end, middle), and
    how wide it may be."""

    points: tuple[tuple[float, float], ...]
    label: tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    height: float


def arrange(
    count: int,
    edges: Sequence[tuple[int, int]],
    width: float,
    *,
    height_of: Callable[[int, float], float],
    columns: int,
    widest: float = 1e9,
    label_width: Callable[[int], float] | None = None,
) -> Drawing:
    """Places `count` boxes in an area `width` wide. `edges` form no cycle. `height_of(box, width)`; at most `columns` in a row, none wider than
    `widest`. `label_width(edge)`: 0 where it has none; no function, no labels."""
    rows = _rows(count, edges, columns)
    row_of = {box: r for r, row in enumerate(rows) for box in row}
    lanes, used = _lanes(edges, row_of, len(rows))
    left, right = used[0] * _LANE, used[1] * _LANE
    spans = {r: _widths(row, width - left - right, widest) for r, row in enumerate(rows)}
    out_ports, in_ports = _ports(count, edges, rows, lanes)

    def port(box: int, ports: Sequence[int], edge: int) -> float:
        x, w = place_x[box]
        k = ports.index(edge)
        return x + w * (k + 1) / (len(ports) + 1)

    place_x: dict[int, tuple[float, float]] = {}
    for r, row in enumerate(rows):
        each = spans[r]
        start = left + (width - left - right - each * len(row) - _GAP_X * (len(row) - 1)) / 2
        for k, box in enumerate(row):
            place_x[box] = (start + k * (each + _GAP_X), each)

    def lane_x(edge: int) -> float:
        side, k = lanes[edge]
        return (k + 0.5) * _LANE if side == 0 else width - (k + 0.5) * _LANE

    def ends(edge: int) -> tuple[float, float]:
        a, b = edges[edge]
        xa, xb = port(a, out_ports[a], edge), port(b, in_ports[b], edge)
        return (xb, xb) if edge not in lanes and abs(xa - xb) < _NEARLY else (xa, xb)

    # Tracks: each gap between rows r and r + 1 holds those that turn there.
    tracks: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for e, (a, b) in enumerate(edges):
        if e in lanes:
            tracks[row_of[a]].append((e, "out"))
            tracks[row_of[b] - 1].append((e, "in"))
        else:
            tracks[row_of[a]].append((e, "both"))
    y = 0.0
    tops: list[float] = []
    heights: list[float] = []
    track_y: dict[tuple[int, str], float] = {}
    label_y: dict[int, float] = {}  # below where its line turns, beside the last upright part
    for r, row in enumerate(rows):
        tall = max(height_of(box, spans[r]) for box in row)
        tops.append(y)
        heights.append(tall)
        y += tall + _HEAD
        for e, part in sorted(tracks[r], key=lambda item: (item[1] != "out", ends(item[0])[1], item[0])):
            labelled = part != "out" and label_width is not None and label_width(e) > 0
            straight = part == "both" and abs(ends(e)[0] - ends(e)[1]) < _STRAIGHT
            turn = 0.0 if straight else _TRACK
            track_y[e, part] = y + turn / 2
            y += turn
            if labelled:
                label_y[e] = y + _LABEL / 2
                y += _LABEL
        y += _HEAD
    height = tops[-1] + heights[-1] if rows else 0.0
    boxes = [Box(0, 0, 0, 0)] * count
    for box, r in row_of.items():
        x, w = place_x[box]
        boxes[box] = Box(x, tops[r], w, heights[r])
    lines = []
    for e, (a, b) in enumerate(edges):
        xa, xb = ends(e)
        ya, yb = boxes[a].y + boxes[a].height, boxes[b].y
        if e in lanes:
            xl, y_out, y_in = lane_x(e), track_y[e, "out"], track_y[e, "in"]
            points = [(xa, ya), (xa, y_out), (xl, y_out), (xl, y_in), (xb, y_in), (xb, yb)]
        else:
            y_in = track_y[e, "both"]
            points = [(xa, ya), (xb, yb)] if abs(xa - xb) < _STRAIGHT else [(xa, ya), (xa, y_in), (xb, y_in), (xb, yb)]
        wide = label_width(e) if label_width else 0.0
        # On the right of the last upright part; over it where there is no room, as a label that interrupts its line.
        x = max(0.0, min(xb + 4, width - wide))
        lines.append(Line(tuple(points), (x, label_y.get(e, y_in))))
    return Drawing(tuple(boxes), tuple(lines), height)


def _rows(count: int, edges: Sequence[tuple[int, int]], columns: int) -> list[list[int]]:
    depth = [0] * count
    into: dict[int, list[int]] = defaultdict(list)
    out: dict[int, list[int]] = defaultdict(list)
    for a, b in edges:
        into[b].append(a)
        out[a].append(b)
    ready = [i for i in range(count) if not into[i]]
    left = {i: len(into[i]) for i in range(count)}
    while ready:
        a = ready.pop()
        for b in out[a]:
            depth[b] = max(depth[b], depth[a] + 1)
            left[b] -= 1
            if not left[b]:
                ready.append(b)
    # A box without predecessors stands right above its first successor, not at the very top.
    for i in range(count):
        if not into[i] and out[i]:
            depth[i] = max(depth[i], min(depth[b] for b in out[i]) - 1)
    levels: dict[int, list[int]] = defaultdict(list)
    for i in range(count):
        levels[depth[i]].append(i)
    rows = [levels[d] for d in sorted(levels)]
    for neighbours, sweep in ((into, rows), (out, rows[::-1]), (into, rows)):
        place = {box: (k + 0.5) / len(row) for row in rows for k, box in enumerate(row)}
        for row in sweep:
            around = {box: [place[n] for n in neighbours[box]] for box in row}
            row.sort(key=lambda box: (sum(around[box]) / len(around[box]) if around[box] else place[box], box))
            place.update({box: (k + 0.5) / len(row) for k, box in enumerate(row)})
    return [row[k : k + columns] for row in rows for k in range(0, len(row), columns)]


def _widths(row: Sequence[int], width: float, widest: float) -> float:
    return min(widest, (width - _GAP_X * (len(row) - 1)) / len(row))


def _lanes(edges: Sequence[tuple[int, int]], row_of: dict[int, int], rows: int) -> tuple[dict[int, tuple[int, int]], tuple[int, int]]:
    """For lines that pass a row: (side, lane), the two sides filled evenly; and how many lanes each side has. Short ones come first, inside."""
    taken: tuple[list[list[tuple[int, int]]], list[list[tuple[int, int]]]] = ([], [])
    lanes: dict[int, tuple[int, int]] = {}
    long = [e for e, (a, b) in enumerate(edges) if row_of[b] > row_of[a] + 1]
    for e in sorted(long, key=lambda e: row_of[edges[e][1]] - row_of[edges[e][0]]):
        span = row_of[edges[e][0]], row_of[edges[e][1]]
        options = []
        for side in (1, 0):
            lane = next(
                (k for k, spans in enumerate(taken[side]) if all(s[1] <= span[0] or s[0] >= span[1] for s in spans)), len(taken[side])
            )
            options.append((lane, -side, side))
        lane, _, side = min(options)
        if lane == len(taken[side]):
            taken[side].append([])
        taken[side][lane].append(span)
        lanes[e] = side, lane
    used = len(taken[0]), len(taken[1])
    # Lane 0 is the innermost: counted from the outside it is the last.
    return {e: (side, used[side] - 1 - lane) for e, (side, lane) in lanes.items()}, used


def _ports(
    count: int, edges: Sequence[tuple[int, int]], rows: Sequence[Sequence[int]], lanes: dict[int, tuple[int, int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """The edges that leave and enter each box, from left to right."""
    place = {box: (k + 0.5) / len(row) for row in rows for k, box in enumerate(row)}

    def side(edge: int, other: int) -> float:
        return place[other] if edge not in lanes else -1.0 if lanes[edge][0] == 0 else 2.0

    out: list[list[int]] = [[] for _ in range(count)]
    into: list[list[int]] = [[] for _ in range(count)]
    for e, (a, b) in enumerate(edges):
        out[a].append(e)
        into[b].append(e)
    for ports in out:
        ports.sort(key=lambda e: side(e, edges[e][1]))
    for ports in into:
        ports.sort(key=lambda e: side(e, edges[e][0]))
    return out, into

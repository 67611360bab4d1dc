"""Split against the better of edge-only and server-only, over bandwidths from 1 to 1000 Mbit/s, on the two-tier testbed.

    python scripts/bench/sweep.py [--models cnn,vit,bert] [--objectives latency,throughput] [--bandwidths 1,3,10,...] [--json FILE]

The input arises on the device; the server alone gets it over the link. All plans of one bandwidth are served at the same time and measured in
turns. The last column is the chosen plan's measured time by that of the best single device: 1.00 where the planner chose that device, below it
where splitting pays. About four minutes for each model and objective.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from testbed.cpu import hurried
from testbed.models import KINDS
from testbed.spec import load
from testbed.sweep import Point, points_json, sweep, sweep_text

import partitioner
from partitioner.worthwhile import MARGIN

_LIMIT = 1.02


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(KINDS), help="of cnn, vit, bert")
    parser.add_argument("--objectives", default="latency,throughput")
    parser.add_argument("--bandwidths", default="1,3,10,30,50,100,300,1000", help="Mbit/s, comma-separated")
    parser.add_argument("--margin", type=float, default=MARGIN, help="by how much a split must be predicted to be better")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    bandwidths = [float(mbit) * 1e6 / 8 for mbit in arguments.bandwidths.split(",")]
    found: dict[str, list[Point]] = {}
    with hurried() as ahead:
        if not ahead:
            print("note: this process cannot go before others; on a busy machine its latencies are longer")
        for kind, objective in itertools.product(arguments.models.split(","), arguments.objectives.split(",")):
            model = partitioner.load_model(f"py:testbed.models:{kind}")
            points = list(
                sweep(load("two-tier"), model, bandwidths, objective, lambda text: print(text, flush=True), margin=arguments.margin)
            )
            found[f"{kind}, {objective}"] = points
            print(f"\n{kind}, {objective}, predicted -> measured\n{sweep_text(points)}", flush=True)
    points = [point for some in found.values() for point in some]
    worst, best = max(points, key=lambda p: p.ratio), min(points, key=lambda p: p.ratio)
    print(f"\n{len(points)} points: never above {worst.ratio:.2f} of the best single device (wanted: {_LIMIT}), at best {best.ratio:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({what: json.loads(points_json(some)) for what, some in found.items()}, indent=1))


if __name__ == "__main__":
    main()

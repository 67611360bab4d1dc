"""Split against the better of edge-only and server-only, over bandwidths from 1 to 1000 Mbit/s, on the two-tier testbed.

    python scripts/bench/sweep.py [--model cnn|vit|bert] [--bandwidths 1,5,20,50,100,300,1000] [--objective latency|throughput] [--json FILE]

The input arises on the device; the server alone gets it over the link. The last column is the chosen plan's measured time by that of the best
single device: 1.00 where the planner chose that device, below it where splitting pays. About five minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from testbed.cpu import hurried
from testbed.models import KINDS
from testbed.spec import load
from testbed.sweep import points_json, sweep, sweep_text

import partitioner

_LIMIT = 1.02


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=KINDS, default="cnn")
    parser.add_argument("--bandwidths", default="1,5,20,50,100,300,1000", help="Mbit/s, comma-separated")
    parser.add_argument("--objective", choices=("latency", "throughput"), default="latency")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    model = partitioner.load_model(f"py:testbed.models:{arguments.model}")
    bandwidths = [float(mbit) * 1e6 / 8 for mbit in arguments.bandwidths.split(",")]
    with hurried():
        points = list(sweep(load("two-tier"), model, bandwidths, arguments.objective, lambda text: print(text, flush=True)))
    print(f"{arguments.model}, {arguments.objective}, predicted -> measured")
    print(sweep_text(points))
    worst, best = max(points, key=lambda p: p.ratio), min(points, key=lambda p: p.ratio)
    print(f"never above {worst.ratio:.2f} of the best single device (wanted: {_LIMIT})")
    print(f"best: {best.ratio:.2f} of it at {best.bandwidth_bytes_per_s * 8 / 1e6:g} Mbit/s")
    if arguments.json:
        arguments.json.write_text(points_json(points))


if __name__ == "__main__":
    main()

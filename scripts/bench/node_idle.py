"""What a node takes before it serves anything, and with a small shard: memory and time to start.

    python scripts/bench/node_idle.py [--rounds 5]

Nodes in processes of their own. Start: from the fork to the address being announced. Memory: resident set, once idle. A node
imports torch when its first stage is activated, so the two differ by torch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch

import partitioner
import splitnet
from nodes.testing import LocalCluster

MIB = 1 << 20


def resident_mib(cluster: LocalCluster, name: str) -> float:
    return psutil.Process(cluster.pid(name)).memory_info().rss / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model = partitioner.capture(torch.nn.Linear(8, 8).eval(), (torch.randn(2, 8),), name="linear")
    starts, idle, first, loaded = [], [], [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        with LocalCluster(1, processes=True) as cluster, tempfile.TemporaryDirectory() as folder:
            starts.append(time.perf_counter() - begun)
            idle.append(resident_mib(cluster, "a"))
            plan = partitioner.plan(partitioner.profile(model), cluster.cluster())
            shards = partitioner.cut(model, plan, Path(folder))
            begun = time.perf_counter()
            splitnet.deploy(plan, shards)
            first.append(time.perf_counter() - begun)
            loaded.append(resident_mib(cluster, "a"))
    print(f"start of a node            {statistics.median(starts):6.2f} s   (medians of {rounds})")
    print(f"memory, nothing deployed   {statistics.median(idle):6.0f} MiB")
    print(f"first deployment           {statistics.median(first):6.2f} s   (imports torch)")
    print(f"memory, a small shard      {statistics.median(loaded):6.0f} MiB")


if __name__ == "__main__":
    main()

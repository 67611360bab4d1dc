"""How fast a shard is loaded against reading the same safetensors directly, and shipped over loopback against copying the file.

    python scripts/bench/load.py [--mib 256] [--rounds 5]

Each round does everything once, in turn, each part in a process of its own that has torch imported and the file in the page cache; medians over
the rounds. Loading: `direct` is safetensors' load_file with each tensor copied into memory of its own (what is only mapped has not been read); `node` is
what Activate does in the process that received the shard; `restarted` is the same in a later process, which hashes every blob first.
Shipping: `copy` is read, write and fsync in one process; `ship` is a deployment's Load calls to a node process, hashed there and fsynced.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from nodes.store import BlobStore
from nodes.testing import LocalCluster
from splitnet.channel import open_channel
from splitnet.graph import GraphDocument, Input, Operator, Ref, Weight, WeightSpec
from splitnet.shard import Shard, open_shard, write_shard
from splitnet.shipping import shard_blobs, ship
from splitnet.tensors import TensorSpec

_MIB = 1 << 20
_SIDE = 1024  # a weight of 4 MiB
_PARTS = ("direct", "node", "restarted")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=256, help="size of the weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=_PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(load(arguments.part, arguments.directory)))
        return
    with tempfile.TemporaryDirectory(prefix="splitnet-bench-") as folder:
        directory = Path(folder)
        shard = make_shard(directory / "shard", max(1, arguments.mib // 4))
        store = BlobStore(directory / "store")
        for blob in shard_blobs({"stage0": shard}):
            data = blob.content if isinstance(blob.content, bytes) else blob.content.read_bytes()
            with store.writer(blob.sha256, blob.size_bytes) as writer:
                writer.write(data)
                writer.commit()
        times: dict[str, list[float]] = {name: [] for name in (*_PARTS, "copy", "ship")}
        for _ in range(arguments.rounds):
            for part in _PARTS:
                times[part].append(fresh(part, directory))
            times["copy"].append(copy(shard.member("weights.safetensors"), directory / "copy"))
            times["ship"].append(asyncio.run(ship_once(shard)))
    report(times, shard.manifest.total_bytes)


def make_shard(directory: Path, weights: int) -> Shard:
    """A chain of square products."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": rng.standard_normal((_SIDE, _SIDE), dtype=np.float32) for i in range(weights)}
    save_file(tensors, directory / "weights.safetensors")
    graph = GraphDocument(
        inputs=(Input("v0", "tensor"),),
        weights={name: WeightSpec("float32", (_SIDE, _SIDE), (0, 1)) for name in tensors},
        operators=tuple(Operator("aten.linear.default", (Ref(f"v{i}"), Weight(f"w{i}")), {}, f"v{i + 1}") for i in range(weights)),
        outputs=(f"v{weights}",),
    )
    return write_shard(
        directory,
        model="bench",
        model_sha256="0" * 64,
        stage="stage0",
        engine="torch-graph",
        inputs=[TensorSpec("v0", "float32", ("batch", _SIDE))],
        outputs=[TensorSpec(f"v{weights}", "float32", ("batch", _SIDE))],
        members={"graph.json": graph.to_bytes(), "weights.safetensors": directory / "weights.safetensors"},
        param_bytes=sum(t.nbytes for t in tensors.values()),
        activation_bytes=8 * _SIDE,
    )


def fresh(part: str, directory: Path) -> float:
    command = [sys.executable, __file__, "--part", part, "--directory", str(directory)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def load(part: str, directory: Path) -> float:
    """Seconds of one load in this process."""
    import torch
    from safetensors.torch import load_file

    from nodes.engines import load_engine

    torch.set_num_threads(1)
    shard = open_shard(directory / "shard")  # also brings the files into the page cache
    load_engine(make_shard(directory / f"small-{os.getpid()}", 1), threads=1)  # imports, first allocations
    if part == "direct":
        started = time.perf_counter()
        tensors = {name: tensor.clone() for name, tensor in load_file(shard.member("weights.safetensors")).items()}
        seconds = time.perf_counter() - started
        assert tensors
        return seconds
    store = BlobStore(directory / "store")
    if part == "node":
        store.shard(shard.sha256)
        store = _forget_shards(store)
    started = time.perf_counter()
    engine = load_engine(store.shard(shard.sha256), threads=1)
    seconds = time.perf_counter() - started
    assert engine.memory_bytes() == shard.manifest.param_bytes
    return seconds


def _forget_shards(store: BlobStore) -> BlobStore:
    """As the process is that received the blobs: it has seen them hashed, and has not yet opened the shard."""
    store._shards.clear()
    return store


def copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_MIB):
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return time.perf_counter() - started


async def ship_once(shard: Shard) -> float:
    with LocalCluster(1, processes=True) as cluster:
        address = cluster.addresses["a"]
        async with open_channel(address) as channel:
            await channel.channel_ready()
            started = time.perf_counter()
            for blob in shard_blobs({"stage0": shard}):
                await ship(channel, address, blob, lambda _: None)
            return time.perf_counter() - started


def report(times: dict[str, list[float]], size_bytes: int) -> None:
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{size_bytes / _MIB:.0f} MiB, medians of {len(times['direct'])} rounds (fastest, slowest)")
    for name, against in (("direct", "direct"), ("node", "direct"), ("restarted", "direct"), ("copy", "copy"), ("ship", "copy")):
        speed = size_bytes / medians[name] / 1e6
        ratio = medians[name] / medians[against]
        print(
            f"{name:10} {medians[name]:7.3f} s ({min(times[name]):.3f}, {max(times[name]):.3f})  {speed:7.0f} MB/s  {ratio:5.2f}x {against}"
        )


if __name__ == "__main__":
    main()

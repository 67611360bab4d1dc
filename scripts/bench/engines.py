"""One model on one 1-thread node per engine, in turns in one run: processor time and wall time per request, and how far answers lie apart.

    python scripts/bench/engines.py [--model resnet|vit] [--engines torch,onnx] [--batch 1] [--rounds 10]

The weights are random, the architectures those of ResNet-50 and ViT-B/16 (the defaults of their configs). The eager module runs in this process
beside them. Processor time is what counts on a machine that does other things meanwhile; wall time is the fastest of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch

import partitioner
import splitnet
from nodes.testing import LocalCluster

_EAGER = "eager module"


def build(name: str) -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return (ViTForImageClassification(ViTConfig()) if name == "vit" else ResNetForImageClassification(ResNetConfig())).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("resnet", "vit"), default="resnet")
    parser.add_argument("--engines", default="torch,onnx", help="as `splitnet node --engine` takes them")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    module = build(arguments.model)
    image = torch.randn(arguments.batch, 3, 224, 224)
    model = partitioner.capture(module, {"pixel_values": image}, name=arguments.model)
    profile = partitioner.profile(model, repeats=2)
    engines = arguments.engines.split(",")
    with contextlib.ExitStack() as stack:
        runs: dict[str, Callable[[], np.ndarray]] = {_EAGER: lambda: module(pixel_values=image).logits.numpy()}
        processes = {_EAGER: psutil.Process()}
        for engine in engines:
            cluster = stack.enter_context(LocalCluster(1, names=[engine], threads=1, processes=True, engine=engine))
            plan = partitioner.plan(profile, cluster.cluster(), objective="latency")
            shards = partitioner.cut(model, plan, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            plan = plan.with_shards({name: shard.sha256 for name, shard in shards.items()})
            splitnet.deploy(plan, shards, name=arguments.model)
            client = stack.enter_context(splitnet.Client(plan.ingress.address, deployment=arguments.model))
            runs[engine] = lambda client=client: client.infer({"pixel_values": image.numpy()}, timeout_s=600)["logits"]
            processes[engine] = psutil.Process(cluster.pid(engine))
        with torch.inference_mode():
            report(runs, processes, arguments.rounds)


def report(runs: dict[str, Callable[[], np.ndarray]], processes: dict[str, psutil.Process], rounds: int) -> None:
    answers = {name: run() for name, run in runs.items()}  # warm, and to be compared
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    repeats = 3  # a process's clock counts in hundredths of a second
    for _ in range(rounds):
        for name, run in runs.items():
            before, started = spent(processes[name]), time.perf_counter()
            for _ in range(repeats):
                run()
            wall[name].append((time.perf_counter() - started) / repeats)
            cpu[name].append((spent(processes[name]) - before) / repeats)
    first = next(name for name in runs if name != _EAGER)
    print(f"{'':14}{'cpu ms':>9}{'wall ms':>9}{'faster (cpu)':>14}{'(wall)':>8}{'RSS MiB':>9}   largest difference (of the largest answer)")
    for name in runs:
        cpu_s, wall_s = statistics.median(cpu[name]), min(wall[name])
        apart, scale = np.abs(answers[name] - answers[_EAGER]).max(), np.abs(answers[_EAGER]).max()
        ratios = f"{statistics.median(cpu[first]) / cpu_s:>14.2f}{min(wall[first]) / wall_s:>8.2f}"
        memory = processes[name].memory_info().rss >> 20
        print(f"{name:14}{cpu_s * 1e3:>9.1f}{wall_s * 1e3:>9.1f}{ratios}{memory:>9}   {apart:.3g} ({apart / scale:.2g})")


def spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()

"""Throughput of a model in two 1-thread nodes against the whole module in one 1-thread process, measured in turns in one run.

    python scripts/bench/pipeline.py [--model vit|resnet] [--images 16] [--rounds 5]

Prints the medians over the rounds and their ratio. Two is the limit; the client takes its share of the two cores, too. On a machine
that does other things meanwhile the ratio says little (one process gets its core more easily than two get both), so the processors'
time per image is printed as well, with the ratio that it allows: no more than the slower node's, and no more than two cores'.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

import partitioner
import splitnet
from nodes.testing import LocalCluster


def build(name: str) -> torch.nn.Module:
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    return (ViTModel(ViTConfig()) if name == "vit" else ResNetModel(ResNetConfig())).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("vit", "resnet"), default="vit")
    parser.add_argument("--images", type=int, default=16, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    module = build(arguments.model)
    image = torch.randn(1, 3, 224, 224)
    model = partitioner.capture(module, {"pixel_values": image}, name=arguments.model)
    profile = partitioner.profile(model)
    with LocalCluster(2, threads=1, processes=True) as cluster, tempfile.TemporaryDirectory() as folder:
        plan = partitioner.plan(profile, cluster.cluster(), objective="throughput", stages=2)
        shards = partitioner.cut(model, plan, Path(folder))
        plan = plan.with_shards({name: shard.sha256 for name, shard in shards.items()})
        splitnet.deploy(plan, shards, name=arguments.model)
        print(plan.explain())
        with splitnet.Client(plan.ingress.address, deployment=arguments.model) as client, torch.inference_mode():
            answer = client.infer({"pixel_values": image.numpy()})
            whole = module(pixel_values=image)
            equal = all(np.array_equal(answer[name], value.numpy()) for name, value in whole.items())
            nodes = [psutil.Process(cluster.pid(name)) for name in cluster.names]
            alone, split, spent = zip(
                *(measure(module, client, image, arguments.images, nodes) for _ in range(arguments.rounds)), strict=True
            )
    one, two = statistics.median(alone), statistics.median(split)
    print(f"{arguments.model}: whole module, one 1-thread process  {one:.3f} images/s")
    print(f"{arguments.model}: two stages, two 1-thread nodes      {two:.3f} images/s   answers equal: {equal}")
    whole_s, client_s, *node_s = (statistics.median(seconds) for seconds in zip(*spent, strict=True))
    shown = ", ".join(f"{seconds:.3f}" for seconds in node_s)
    allowed = whole_s / max(*node_s, (sum(node_s) + client_s) / 2)
    print(f"processor seconds per image: whole {whole_s:.3f}   nodes {shown}, client {client_s:.3f}   ratio that they allow {allowed:.3f}")
    print(f"ratio {two / one:.3f}   (rounds: {', '.join(f'{b / a:.3f}' for a, b in zip(alone, split, strict=True))})")


def measure(
    module: torch.nn.Module, client: splitnet.Client, image: torch.Tensor, images: int, nodes: Sequence[psutil.Process]
) -> tuple[float, float, tuple[float, ...]]:
    """Images per second of the module here, then of the deployed plan with its pipeline kept full; and the processors' seconds per
    image: of the module, then of this process as a client and of each node."""

    def spent() -> list[float]:
        times = [process.cpu_times() for process in (psutil.Process(), *nodes)]
        return [time_.user + time_.system for time_ in times]

    before, started = spent(), time.perf_counter()
    for _ in range(images // 2):
        module(pixel_values=image)
    alone = images // 2 / (time.perf_counter() - started)
    between = spent()

    def requests() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(images):
            yield {"pixel_values": image.numpy()}

    started = time.perf_counter()
    answers = sum(1 for _ in client.stream(requests()))
    split = answers / (time.perf_counter() - started)
    each = [(b - a) / answers for a, b in zip(between, spent(), strict=True)]
    return alone, split, ((between[0] - before[0]) / (images // 2), *each)


if __name__ == "__main__":
    main()

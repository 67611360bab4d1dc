"""A tenfold fall of bandwidth after which another plan is better: `splitnet watch` switches while clients are being answered.

    python scripts/bench/replanning.py [--from-mbit 100] [--model cnn] [--for 40]

Two nodes on the testbed's "two-tier" (a weak one where the input arises, a strong one), probed and profiled; the plan for the least latency is cut, deployed and asked without a
pause. Some seconds later the link falls to a tenth. The command, in a process of its own, looks every second; its lines are printed with the
seconds since the fall. At the end: how many requests failed, whether every answer had the bits of the whole model (lossless codecs), and the latency before, after the fall
and after the switch. About two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from testbed.bed import Testbed
from testbed.measuring import Subject, probed
from testbed.spec import load

import partitioner
import splitnet
from splitnet.explain import seconds_text
from splitnet.plan import Plan

NAME = "replanning"
_BYTES_PER_MBIT = 1e6 / 8
_STEADY_S = 3.0


class Asking:
    """One client that asks without a pause, in a thread."""

    def __init__(self, plan: Plan, inputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
        self._plan, self._inputs, self._expected = plan, inputs, expected
        self.times: list[tuple[float, float]] = []  # when it was asked, and how long it took
        self.failed: list[str] = []
        self.other = 0
        self._ended = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()

    def median_s(self, start_s: float, end_s: float) -> float:
        return float(np.median([took for asked, took in self.times if start_s <= asked < end_s] or [float("nan")]))

    def _run(self) -> None:
        with splitnet.Client(self._plan.ingress.address, NAME) as client:
            while not self._ended:
                asked_s = time.monotonic()
                try:
                    answer = client.infer(self._inputs)
                except splitnet.SplitnetError as error:
                    self.failed.append(str(error))
                    continue
                self.times.append((asked_s, time.monotonic() - asked_s))
                self.other += not all(np.array_equal(answer[name], bits) for name, bits in self._expected.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from-mbit", type=float, default=100.0)
    parser.add_argument("--model", default="cnn", choices=("cnn", "vit", "bert"))
    parser.add_argument("--for", dest="for_s", type=float, default=40.0, help="seconds that are watched after the fall")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = load("two-tier")
    before, after = (spec.at_bandwidth(arguments.from_mbit * share * _BYTES_PER_MBIT) for share in (1.0, 0.1))
    with Testbed(before) as bed, tempfile.TemporaryDirectory(prefix="splitnet-bench-") as scratch:
        folder, source = Path(scratch), f"py:testbed.models:{arguments.model}"
        model = partitioner.load_model(source)
        cluster = probed(bed, 0.5)
        profile = Subject.measure(bed, model, cluster, 1.5).profile
        plan = partitioner.plan(profile, cluster, objective="latency", input_at="device", lossless=True)
        with bed.free_for_clients():
            shards = partitioner.cut(model, plan, folder / "plan.shards")
            plan = plan.with_shards({stage: shard.sha256 for stage, shard in shards.items()})
            splitnet.deploy(plan, shards, name=NAME)
        plan.save(folder / "plan.json")
        cluster.save(folder / "cluster.toml")
        profile.save(folder / "profile.json")
        _say("plan", plan)
        inputs = {name: value.numpy() for name, value in model.example_inputs.items()}
        with torch.inference_mode():
            expected = {name: value.numpy() for name, value in model.run(model.example_inputs).items()}
        _watch(bed, after, folder, source, Asking(plan, inputs, expected), arguments.for_s)
        splitnet.undeploy(cluster, NAME)


def _watch(bed: Testbed, after: object, folder: Path, source: str, asking: Asking, for_s: float) -> None:
    scripts = str(Path(__file__).resolve().parents[1])
    command = [
        sys.executable, "-m", "splitnet", "watch", "plan.json", "--cluster", "cluster.toml", "--profile", "profile.json", "--model", source, "--name", NAME, "--every", "1",
        "--steady", str(_STEADY_S), "--lossless", "--json", "--for", str(for_s + 15),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([scripts, os.environ.get("PYTHONPATH", "")])}
    switched_s = 0.0
    with asking, subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        print(f"watch: {first['why']}; planning took {seconds_text(first['planning_s'])}")
        time.sleep(4.0)
        falls_s = time.monotonic()
        bed.reshape(after)  # type: ignore[arg-type] # a BedSpec
        print("the link falls to a tenth")
        for line in watching.stdout:
            since_s, look = time.monotonic() - falls_s, json.loads(line)
            if since_s < 0.2:
                continue
            what = f"; switched to generation {look['switched']['generation']}: {look['best']}" if look["switched"] else ""
            present, best = (seconds_text(look[k]) if look[k] else "-" for k in ("present_s", "best_s"))
            print(f"{since_s:5.1f} s: present {present}, best {best}: {look['error'] or look['why']}; {', '.join(look['changed'])}{what}")
            switched_s = time.monotonic() if look["switched"] else switched_s
            if since_s > for_s or (switched_s and time.monotonic() - switched_s > 8):
                break
        watching.terminate()
    end_s = time.monotonic()
    print(f"latency before the fall {seconds_text(asking.median_s(falls_s - 3, falls_s))} (median)")
    print(f"after it, before the switch {seconds_text(asking.median_s(falls_s + 1, switched_s or end_s))}")
    if switched_s:
        print(f"after the switch, {switched_s - falls_s:.1f} s after the fall: {seconds_text(asking.median_s(switched_s + 1, end_s))}")
    print(f"requests: {len(asking.times)} answered, {len(asking.failed)} failed, {asking.other} with other bits than the whole model's")
    for error in asking.failed[:3]:
        print(f"  {error}")


def _say(what: str, plan: Plan) -> None:
    assert plan.prediction is not None
    cuts = ", ".join(f"{stage.node}: {stage.first or stage.operators[0]}..{stage.last or stage.operators[-1]}" for stage in plan.stages)
    print(f"{what}: {cuts}; predicted {seconds_text(plan.prediction.latency_s)}")


if __name__ == "__main__":
    main()

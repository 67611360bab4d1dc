"""A tenfold fall of bandwidth while a pipeline serves, and back: throughput beside that of the best fixed codec, and requests lost.

    python scripts/bench/adaptation.py [--from-mbit 50] [--model cnn] [--lossless]

Two nodes on the testbed's "two-tier" (one weak, one strong), the client beside the weak one, the pipeline kept full. After some seconds the link's
bandwidth falls to a tenth; what is answered between 2 s and 4 s after that is held against the steady throughput of a permitted codec alone at
the new bandwidth, measured in the same run: the plan's, and the two that make the fewest bytes, whichever is best; likewise after the rise.
Aim: at least 90% of the best, and nothing lost. About a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from testbed.bed import Testbed
from testbed.measuring import Subject, probed
from testbed.spec import load

import partitioner
import splitnet
from partitioner.structure import Structure
from splitnet.explain import bytes_text, table
from splitnet.plan import Plan, Transfer

AIM = 0.9
_WINDOW_S = (2.0, 4.0)  # after a change
_BYTES_PER_MBIT = 1e6 / 8


class Steady:
    """A client that keeps the pipeline full, in a thread: when each answer came, and how many were lost or came in another order."""

    def __init__(self, plan: Plan, name: str, inputs: list[dict[str, np.ndarray]]) -> None:
        self._plan, self._name, self._inputs = plan, name, inputs
        self.answers: list[float] = []
        self.asked = self.wrong = 0
        self.worst = 0.0
        self.error = ""
        self._ended = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Steady:
        with splitnet.Client(self._plan.ingress.address, self._name) as client:
            self._expected = [client.infer(given) for given in self._inputs]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()

    @property
    def lost(self) -> int:
        return self.asked - len(self.answers)

    def per_s(self, start_s: float, end_s: float) -> float:
        """Answers in a span of the clock, by the times between them."""
        inside = [at for at in self.answers if start_s <= at < end_s]
        return (len(inside) - 1) / (inside[-1] - inside[0]) if len(inside) > 1 else len(inside) / (end_s - start_s)

    def _requests(self) -> Iterator[dict[str, np.ndarray]]:
        for number in itertools.count():
            if self._ended:
                return
            self.asked += 1
            yield self._inputs[number % len(self._inputs)]

    def _run(self) -> None:
        try:
            with splitnet.Client(self._plan.ingress.address, self._name) as client:
                for number, answer in enumerate(client.stream(self._requests())):
                    self.answers.append(time.monotonic())
                    expected = self._expected[number % len(self._inputs)]
                    off = max(float(np.abs(answer[k] - expected[k]).max() / np.abs(expected[k]).max()) for k in expected)
                    self.worst, self.wrong = max(self.worst, off), self.wrong + (off > 0.1)
        except splitnet.SplitnetError as error:
            self.error = str(error)


def cut_after(structure: Structure, seconds: tuple[float, ...], share: float) -> str:
    """The costly operator before which most of a tenth of the model's time has passed and the fewest bytes cross."""
    elapsed = list(itertools.accumulate(seconds))
    return next(v.name for i, v in enumerate(structure.vertices) if elapsed[i] >= share * elapsed[-1] and not v.cheap)


def fixed(plan: Plan, codec: str) -> Plan:
    """That codec for good, on every transfer that may have it; where others may not, on what goes back to the client, "zstd"."""

    def of(transfer: Transfer) -> str:
        permitted = {option.name for option in transfer.codecs}
        return next((name for name in (codec, "zstd") if name in permitted), transfer.codec)

    return dataclasses.replace(plan, transfers=tuple(dataclasses.replace(t, codec=of(t), codecs=()) for t in plan.transfers))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from-mbit", type=float, default=50.0)
    parser.add_argument("--model", default="cnn", choices=("cnn", "vit", "bert"))
    parser.add_argument("--lossless", action="store_true")
    parser.add_argument("--cut", type=float, default=0.15, help="share of the model's time before the cut")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = load("two-tier")
    before, after = (spec.at_bandwidth(arguments.from_mbit * share * _BYTES_PER_MBIT) for share in (1.0, 0.1))
    device, server = spec.names
    with Testbed(before) as bed:
        for note in bed.notes:
            print(f"note: {note}")
        model = partitioner.load_model(f"py:testbed.models:{arguments.model}")
        cluster = probed(bed, 0.5)
        subject = Subject.measure(bed, model, cluster, 1.5)
        at = cut_after(subject.profile.structure, subject.profile.columns[""].seconds, arguments.cut)
        plan = partitioner.plan(
            subject.profile, cluster, objective="throughput", at=[at], nodes=[device, server], lossless=arguments.lossless
        )
        between = next(t for t in plan.transfers if t.source and t.target)
        print(
            f"{arguments.model}: {bytes_text(between.bytes)} cross, planned codec {between.codec}, permitted {', '.join(o.name for o in between.codecs)}"
        )
        inputs = [{k: np.asarray(v) for k, v in example.items()} for example in _examples(model, 3)]
        with subject.deployed(plan, fixed=False) as served, Steady(served, "testbed", inputs) as steady:
            time.sleep(3.0)
            falls_s = time.monotonic()
            bed.reshape(after)
            marks = _watch(served, falls_s, _WINDOW_S[1] + 0.5)
            rises_s = time.monotonic()
            bed.reshape(before)
            marks += _watch(served, rises_s, _WINDOW_S[1] + 0.2)
        print(f"steady before the fall: {steady.per_s(falls_s - 1.5, falls_s):.2f}/s")
        print("\n".join(table([("after", "codecs there and back (switches)", "goodput there", "queued", "unacknowledged"), *marks])))
        alone: dict[str, tuple[float, float]] = {}
        smallest = sorted(between.codecs, key=lambda option: -option.ratio)[:2]
        for codec in dict.fromkeys([between.codec, *(option.name for option in smallest)]):
            with subject.deployed(fixed(plan, codec)) as served, Steady(served, "testbed", inputs) as one:
                time.sleep(1.8)
                middle_s = time.monotonic()
                bed.reshape(after)
                time.sleep(3.5)
                end_s = time.monotonic()
                bed.reshape(before)
            alone[codec] = one.per_s(middle_s - 1.2, middle_s), one.per_s(end_s - 2.0, end_s)
    _tell(steady, alone, falls_s, rises_s)


def _tell(steady: Steady, alone: dict[str, tuple[float, float]], falls_s: float, rises_s: float) -> None:
    rows: list[tuple[str, ...]] = [("codec alone", "before the fall", "after it")]
    rows += [(codec, f"{fast:.2f}/s", f"{slow:.2f}/s") for codec, (fast, slow) in alone.items()]
    print("\n".join(table(rows)))
    for what, changed_s, which in (("fall", falls_s, 1), ("rise", rises_s, 0)):
        best = max(alone, key=lambda codec: alone[codec][which])
        reached, optimum = steady.per_s(changed_s + _WINDOW_S[0], changed_s + _WINDOW_S[1]), alone[best][which]
        print(
            f"2 s to 4 s after the {what}: {reached:.2f}/s; best codec alone, {best}: {optimum:.2f}/s; ratio {reached / optimum:.3f} (aim {AIM})"
        )
    print(
        f"requests: {steady.asked} asked, {len(steady.answers)} answered in their order, {steady.lost} lost {steady.error}; "
        f"{steady.wrong} beyond 0.1 of the largest output, the worst {steady.worst:.4f}"
    )


def _watch(plan: Plan, since_s: float, for_s: float) -> list[tuple[str, ...]]:
    """What the link's status said, twice a second."""
    rows = []
    while (after_s := time.monotonic() - since_s) < for_s:
        status = splitnet.status(plan)
        link = next(found for node in status if node.name == plan.ingress.name for found in node.links)
        back = [found for node in status if node.name != plan.ingress.name for found in node.links]
        codecs = [f"{c.codec} ({c.switches})" for found in (link, *back) for c in found.codecs]
        rows.append(
            (
                f"{after_s:.1f} s", ", ".join(codecs), f"{link.goodput_bytes_per_s / 1e6:.3f} MB/s", bytes_text(link.queued_bytes),
                bytes_text(link.unacknowledged_bytes),
            )
        )  # fmt: skip
        time.sleep(0.45)
    return rows


def _examples(model: partitioner.ModelGraph, count: int) -> Iterator[dict[str, np.ndarray]]:
    """The example inputs, and others of their kind."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield {
            name: generator.standard_normal(value.shape).astype(value.numpy().dtype) if value.is_floating_point() else value.numpy()
            for name, value in model.example_inputs.items()
        }


if __name__ == "__main__":
    main()

"""The demo's two tasks, told from the model to the answer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import partitioner
from partitioner.bandwidth import probe
from partitioner.demo.boxes import running_nodes
from partitioner.demo.digits import load_digits, train
from partitioner.demo.serving import Batches, Measured, Served, compare, only, serve
from partitioner.demo.text import TextTask
from partitioner.resizing import at_sizes
from splitnet.cluster import Cluster

if TYPE_CHECKING:
    from partitioner.graph import ModelGraph

__all__ = ["Report", "Say", "TaskReport", "run"]

Say = Callable[[str], None]
_NODES = ("a", "b", "c")
_TEXT_BATCH = 4
_DIGITS_BATCH = 50


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What one model did: split over the nodes, and whole on the first of them. `score` is the share of right answers."""

    model: str
    stages: int
    split: Measured
    whole: Measured
    equal_to_one_node: bool
    equal_to_torch: bool
    score: float
    score_of_whole: float


@dataclass(frozen=True, slots=True)
class Report:
    tasks: tuple[TaskReport, ...]

    @property
    def ok(self) -> bool:
        """Every answer of the split model equals the whole model's, bit for bit."""
        return all(task.equal_to_one_node and task.equal_to_torch for task in self.tasks)

    def to_json(self) -> dict[str, object]:
        return {"ok": self.ok, "tasks": [asdict(task) for task in self.tasks]}


def run(minilm: Path, folder: Path, say: Say) -> Report:
    """Starts three nodes, measures them, and serves both models over them. Raises the system's own errors."""
    import torch

    torch.set_num_threads(1)  # as the nodes: the number of threads decides how sums are split, and so the last bit
    say("Starting three node servers on this machine, one thread each")
    with running_nodes(_NODES) as addresses:
        for name, address in addresses.items():
            say(f"  node {name}  {address}")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if cores <= len(addresses):
            say(f"  They share {cores} cores, which the predictions below count with, and which the client takes its part of, too.")
        say("Measuring the nodes and the links between them")
        cluster = probe(list(addresses.values()))
        for link in cluster.links:
            say(f"  {link.source} -> {link.target}  {link.bandwidth_bytes_per_s / 1e6:7.0f} MB/s  {link.latency_s * 1e3:.2f} ms")
        return Report((_search(minilm, cluster, folder, say), _digits(cluster, folder, say)))


def _search(minilm: Path, cluster: Cluster, folder: Path, say: Say) -> TaskReport:
    say("\n1. Search in a document: all-MiniLM-L6-v2, real weights")
    task = TextTask(minilm, _TEXT_BATCH)
    paragraphs = list(task.batches(task.paragraphs))
    questions = list(task.batches([question.text for question in task.questions]))
    batches = [*paragraphs, *questions]
    model = at_sizes(partitioner.load_model(f"hf:{minilm}"), {"batch": _TEXT_BATCH, "sequence": task.tokens})
    eager = _in_torch(minilm, batches)
    with _split_and_whole(model, cluster, folder, "minilm", say) as (split, whole):
        answers, measured = compare(split, batches, cluster)
        whole_answers, measured_whole = compare(whole, batches, cluster)

    def search(outputs: list[dict[str, np.ndarray]]) -> list[int]:
        known, asked = outputs[: len(paragraphs)], outputs[len(paragraphs) :]
        return [int(best) for best in (task.embed(questions, asked) @ task.embed(paragraphs, known).T).argmax(1)]

    found, found_by_whole = search(answers), search(whole_answers)
    for question, best in zip(task.questions, found, strict=True):
        say(f"  {question.text}\n    -> {task.paragraphs[best][:100]}...")
    right = [question.paragraph for question in task.questions]
    report = TaskReport(
        "all-MiniLM-L6-v2", len(split.plan.stages), measured, measured_whole,
        equal_to_one_node=_equal(answers, whole_answers), equal_to_torch=_equal(answers, eager),
        score=_share(found, right), score_of_whole=_share(found_by_whole, right),
    )  # fmt: skip
    _tell(report, f"questions answered by the right paragraph, batches of {_TEXT_BATCH} paragraphs", say)
    return report


def _digits(cluster: Cluster, folder: Path, say: Say) -> TaskReport:
    say("\n2. Handwritten digits: a small convolutional network, trained now")
    import torch

    digits = load_digits()
    net = train(digits)
    model = partitioner.capture(net, (torch.from_numpy(digits.test_images[:_DIGITS_BATCH]),), name="digits")
    name = model.structure.inputs[0].name
    batches = [{name: images} for images in np.split(digits.test_images, len(digits.test_images) // _DIGITS_BATCH)]
    with _split_and_whole(model, cluster, folder, "digits", say) as (split, whole):
        answers, measured = compare(split, batches, cluster)
        whole_answers, measured_whole = compare(whole, batches, cluster)
    with torch.inference_mode():
        eager = [{"output": net(torch.from_numpy(batch[name])).numpy()} for batch in batches]

    def classify(outputs: list[dict[str, np.ndarray]]) -> list[int]:
        return [int(label) for answer in outputs for label in answer["output"].argmax(1)]

    right = [int(label) for label in digits.test_labels]
    report = TaskReport(
        "digits CNN", len(split.plan.stages), measured, measured_whole,
        equal_to_one_node=_equal(answers, whole_answers), equal_to_torch=_equal(answers, eager),
        score=_share(classify(answers), right), score_of_whole=_share(classify(whole_answers), right),
    )  # fmt: skip
    _tell(report, f"of {len(right)} held-out images right, batches of {_DIGITS_BATCH}", say)
    return report


@contextlib.contextmanager
def _split_and_whole(model: ModelGraph, cluster: Cluster, folder: Path, name: str, say: Say) -> Iterator[tuple[Served, Served]]:
    """The model deployed twice: in three stages, and whole on the first node."""
    say("Measuring the operators")
    profile = partitioner.profile(model, cluster=cluster)
    split = serve(model, cluster, name=name, stages=len(_NODES), folder=folder, profile=profile)
    say(split.plan.explain())
    whole = serve(model, only(cluster, split.plan.ingress.name), name=f"{name}-whole", stages=1, folder=folder, profile=profile)
    try:
        yield split, whole
    finally:
        for served in (whole, split):
            served.unload()


def _in_torch(folder: Path, batches: Batches) -> list[dict[str, np.ndarray]]:
    """The answers of the original model in this process, by transformers and PyTorch alone."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(folder)).eval()
    with torch.inference_mode():
        outputs = [model(**{name: torch.from_numpy(array) for name, array in batch.items()}) for batch in batches]
    return [{name: value.numpy() for name, value in output.items()} for output in outputs]


def _equal(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> bool:
    """Bit for bit, in the same order and under the same names."""
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name], equal_nan=True) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def _share(found: list[int], right: list[int]) -> float:
    return sum(a == b for a, b in zip(found, right, strict=True)) / len(right)


def _tell(report: TaskReport, unit: str, say: Say) -> None:
    say(f"  {report.score:.1%} {unit} (whole model: {report.score_of_whole:.1%})")
    for title, measured in ((f"{report.stages} nodes", report.split), ("1 node", report.whole)):
        links = ", ".join(f"{link} {size:,} B" for link, size in measured.sent_bytes.items()) or "none"
        say(
            f"  {title:8} {measured.latency_s * 1e3:7.1f} ms per batch   {measured.batches_per_s:6.1f} batches/s   between nodes: {links} per batch"
        )
    say(f"  answers equal to one node's, bit for bit: {'yes' if report.equal_to_one_node else 'NO'}")
    say(f"  answers equal to PyTorch's in one process: {'yes' if report.equal_to_torch else 'NO'}")

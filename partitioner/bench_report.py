"""What a benchmark found: a document that can be kept and read again, and predicted beside measured in words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitnet.documents import load_document, save_document
from splitnet.errors import BadInput
from splitnet.explain import bytes_text, seconds_text, table
from splitnet.plan import Plan, Prediction

__all__ = ["Alone", "BenchReport", "StageTime", "report_text"]

REPORT_VERSION = 1


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds per request of one stage, as its node counted them; `predicted_s` is its compute time in the plan."""

    stage: str
    node: str
    predicted_s: float
    compute_s: float
    wait_s: float
    decode_s: float
    encode_s: float
    send_s: float


@dataclass(frozen=True, slots=True)
class Alone:
    """The whole model on one node; `why_not` where that could not be."""

    node: str
    latency_p50_s: float
    latency_p95_s: float
    throughput_per_s: float
    why_not: str = ""


@dataclass(frozen=True)
class BenchReport:
    """Latency is of one request with no other around, seen by the client; throughput with the pipeline kept full, the time of filling it
    left out. `client_s` is the client's own way to the ingress and back, which latency holds and no plan predicts; `client_cpu_s`, where the client
    stands on the ingress's machine, its processor seconds per request divided by the machine's cores, which then are the nodes' no more. Bytes per link and
    `stages` are per request with the pipeline full (means), `stages_alone` with one request at a time (medians), all from the nodes' own
    counters. `reserved_bytes` per node is what the stages took of its limit, `process_bytes` what the process has in memory."""

    model: str
    model_sha256: str
    plan: str  # the document
    requests: int
    batch: int
    latency_p50_s: float
    latency_p95_s: float
    throughput_per_s: float
    client_s: float
    bytes_per_link: Mapping[str, int]
    reserved_bytes: Mapping[str, int]
    process_bytes: Mapping[str, int]
    stages: tuple[StageTime, ...]
    stages_alone: tuple[StageTime, ...]
    client_cpu_s: float = 0.0
    deployed_for_this: bool = False
    alone: tuple[Alone, ...] = ()
    version: int = field(default=REPORT_VERSION)

    def expected_per_s(self, prediction: Prediction) -> float:
        """The predicted throughput; where the cores that the nodes share are the bottleneck, less what this client takes of them."""
        if "shared by nodes" not in prediction.bottleneck:
            return prediction.throughput_per_s
        return 1.0 / (1.0 / prediction.throughput_per_s + self.client_cpu_s)

    def with_alone(self, alone: tuple[Alone, ...]) -> BenchReport:
        return dataclasses.replace(self, alone=alone)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> BenchReport:
        """Raises BadInput where the document is not a report of this version."""
        try:
            document: dict[str, Any] = json.loads(text)
            if document.get("version") != REPORT_VERSION:
                raise BadInput(f"the report has version {document.get('version')!r}, this splitnet reads version {REPORT_VERSION}")
            for key in ("stages", "stages_alone"):
                document[key] = tuple(StageTime(**{**s, **{k: float(v) for k, v in s.items() if k.endswith("_s")}}) for s in document[key])
            document["alone"] = tuple(Alone(**a) for a in document["alone"])
            document.setdefault("client_cpu_s", 0.0)
            for key in ("latency_p50_s", "latency_p95_s", "throughput_per_s", "client_s", "client_cpu_s"):
                document[key] = float(document[key])
            return cls(**document)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"not what `splitnet bench -o` writes: {type(error).__name__}: {error}") from None

    def save(self, path: str | Path) -> None:
        save_document(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> BenchReport:
        return load_document(path, cls.from_json, BadInput, what="", remedy="make it with `splitnet bench PLAN -o FILE`")


def report_text(plan: Plan, report: BenchReport) -> str:
    """Predicted beside measured, for people."""
    lines = [f"{plan.model}: {report.requests} requests one by one, {report.requests} with the pipeline full, batches of {report.batch}"]
    if report.deployed_for_this:
        lines.append("the plan was not deployed: it was for this, and was taken off again")
    lines += ["", *table(_rows(plan, report, plan.prediction))]
    if report.client_s > 0.01 * report.latency_p50_s:
        lines.append(f"  (predicted latency includes {seconds_text(report.client_s)} for this client's own way to the ingress and back)")
    if plan.prediction and report.expected_per_s(plan.prediction) != plan.prediction.throughput_per_s:
        lines.append(f"  (predicted throughput leaves {seconds_text(report.client_cpu_s)} of the shared cores per request to this client)")
    for title, stages in (("one request at a time", report.stages_alone), ("pipeline full", report.stages)):
        rows: list[tuple[str, ...]] = [("stage", "node", "wait", "decode", "compute", "encode", "send")]
        rows += [(s.stage, s.node, *map(seconds_text, (s.wait_s, s.decode_s, s.compute_s, s.encode_s, s.send_s))) for s in stages]
        lines += ["", f"measured per request, {title}", *table(rows)]
    if report.alone:
        lines += ["", *table(_alone_rows(report, plan.prediction)), "", _verdict(report)]
    return "\n".join(lines)


def _rows(plan: Plan, report: BenchReport, predicted: Prediction | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "predicted", "measured", "measured / predicted")]

    def row(what: str, expected: float | None, seen: float, text: Callable[[float], str]) -> None:
        rows.append((what, text(expected) if expected else "-", text(seen), f"{seen / expected:.2f}" if expected else "-"))

    row("latency p50", predicted.latency_s + report.client_s if predicted else None, report.latency_p50_s, seconds_text)
    row("latency p95", None, report.latency_p95_s, seconds_text)
    row("throughput", report.expected_per_s(predicted) if predicted else None, report.throughput_per_s, _rate)
    expected_bytes = dict(predicted.bytes_per_link) if predicted else {}
    for link in sorted({*expected_bytes, *report.bytes_per_link}):
        row(f"bytes {link}", expected_bytes.get(link), report.bytes_per_link.get(link, 0), bytes_text)
    expected_bytes = dict(predicted.memory_bytes) if predicted else {}
    for node in plan.nodes:
        if node.name in report.reserved_bytes:
            row(f"memory {node.name}", expected_bytes.get(node.name), report.reserved_bytes[node.name], bytes_text)
    for stage in report.stages_alone:
        row(f"compute {stage.stage} on {stage.node}", stage.predicted_s, stage.compute_s, seconds_text)
    return rows


def _alone_rows(report: BenchReport, predicted: Prediction | None) -> list[tuple[str, ...]]:
    known = {a.node: a for a in predicted.alternatives} if predicted else {}
    rows: list[tuple[str, ...]] = [("one node alone", "latency predicted", "p50", "p95", "throughput predicted", "measured")]
    for a in report.alone:
        expected = known.get(a.node)
        latency = seconds_text(expected.latency_s) if expected else "-"
        rate = _rate(expected.throughput_per_s) if expected else "-"
        if a.why_not:
            rows.append((a.node, latency, "not possible", "", rate, a.why_not))
        else:
            rows.append((a.node, latency, seconds_text(a.latency_p50_s), seconds_text(a.latency_p95_s), rate, _rate(a.throughput_per_s)))
    return rows


def _verdict(report: BenchReport) -> str:
    able = [a for a in report.alone if not a.why_not]
    if not able:
        return "No node can serve the model alone."
    fastest = min(able, key=lambda a: a.latency_p50_s)
    busiest = max(able, key=lambda a: a.throughput_per_s)
    return (
        f"Measured: {fastest.latency_p50_s / report.latency_p50_s:.2f}x the speed and {report.throughput_per_s / busiest.throughput_per_s:.2f}x "
        f"the throughput of the best node alone ({fastest.node}, {busiest.node})."
    )


def _rate(figure: float) -> str:
    return f"{figure:.4g} batches/s"

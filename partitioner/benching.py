"""`splitnet bench`: real requests to a deployed plan; what was predicted beside what is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from partitioner.sizes import dimension_size
from splitnet.errors import BadInput, BadPlan, NodeUnavailable, NotFound
from splitnet.explain import bytes_text, seconds_text, table
from splitnet.install import default_name, status
from splitnet.node_status import NodeStatus, StageStatus
from splitnet.plan import Plan
from splitnet.sync import Client
from splitnet.tensors import numpy_dtype

__all__ = ["BenchReport", "StageTime", "bench", "random_inputs", "report_text"]

_WARM_UP = 3

Inputs = Mapping[str, np.ndarray]


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


@dataclass(frozen=True)
class BenchReport:
    """Latency is of one request with no other around, seen by the client; throughput with the pipeline kept full, the time of filling it
    left out; bytes per link and times per stage are per request, from the nodes' own counters while the pipeline was full."""

    requests: int
    batch: int
    latency_p50_s: float
    latency_p95_s: float
    throughput_per_s: float
    bytes_per_link: Mapping[str, int]
    stages: tuple[StageTime, ...]


def bench(
    plan: Plan,
    *,
    deployment: str = "",
    requests: int = 40,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    timeout_s: float = 60.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Sends `requests` requests one after another and as many at once to the plan's deployment (default: the name that `splitnet deploy`
    gives it). Inputs are random, see `random_inputs`; `sizes` gives the sizes of symbolic dimensions (default: those of the plan's
    prediction). Raises NodeUnavailable, NotFound where nothing is deployed, BadPlan where something else is, and what a request fails with.
    """
    if requests < 2:
        raise BadInput(f"requests must be at least 2, got {requests}")
    name = deployment or default_name(plan.model)
    known = dict(plan.prediction.symbols) if plan.prediction else {}
    if plan.prediction:
        known.setdefault("batch", plan.prediction.batch)
    inputs = random_inputs(plan, {**known, **(sizes or {})}, seed)
    total, done = _WARM_UP + 2 * requests, 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, total)

    with Client(plan.ingress.address, deployment=name, timeout_s=timeout_s) as client:
        if client.describe().plan_sha256 not in (plan.sha256, ""):
            raise BadPlan(f"the deployment {name!r} serves another plan", remedy="deploy this one with `splitnet deploy`")
        latencies = []
        for k in range(_WARM_UP + requests):
            start = time.perf_counter()
            client.infer(inputs)
            if k >= _WARM_UP:
                latencies.append(time.perf_counter() - start)
            step()
        before = _status(plan)
        throughput = _throughput(client, inputs, requests, step)
        after = _status(plan)
    return BenchReport(
        requests=requests,
        batch=(sizes or {}).get("batch", known.get("batch", 1)),
        latency_p50_s=float(np.percentile(latencies, 50)),
        latency_p95_s=float(np.percentile(latencies, 95)),
        throughput_per_s=throughput,
        bytes_per_link=_link_bytes(before, after, requests),
        stages=tuple(_stage_times(plan, name, before, after)),
    )


def random_inputs(plan: Plan, sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs that fit the plan: normal deviates for floats, and for integers and booleans ones, which are valid as token ids and as
    masks alike. Raises BadInput for a symbolic dimension whose size is not given."""
    generator = np.random.default_rng(seed)
    inputs = {}
    for spec in plan.inputs:
        shape = tuple(dimension_size(spec.name, dimension, sizes) for dimension in spec.shape)
        dtype = numpy_dtype(spec.dtype)
        if spec.dtype in ("bool", "int64", "int32", "int16", "int8", "uint8"):
            inputs[spec.name] = np.ones(shape, dtype)
        else:
            inputs[spec.name] = generator.standard_normal(shape, dtype=np.float32).astype(dtype)
    return inputs


def _throughput(client: Client, inputs: Inputs, requests: int, step: Callable[[], None]) -> float:
    """Answers per second once the pipeline is full."""

    def feed() -> Iterator[Inputs]:
        for _ in range(requests):
            yield inputs

    arrivals = []
    for _ in client.stream(feed()):
        arrivals.append(time.perf_counter())
        step()
    filled = min(client.max_in_flight, requests // 4)
    return (len(arrivals) - 1 - filled) / max(arrivals[-1] - arrivals[filled], 1e-9)


def _status(plan: Plan) -> list[NodeStatus]:
    nodes = status(plan)
    for node in nodes:
        if node.error:
            raise NodeUnavailable(node.error, node=node.name)
    return nodes


def _link_bytes(before: list[NodeStatus], after: list[NodeStatus], requests: int) -> dict[str, int]:
    def sent(nodes: list[NodeStatus]) -> dict[str, int]:
        return {f"{node.name}->{link.target}": link.sent_bytes for node in nodes for link in node.links}

    earlier, now = sent(before), sent(after)
    return {link: (size - earlier.get(link, 0)) // requests for link, size in now.items() if size > earlier.get(link, 0)}


def _stage_times(plan: Plan, name: str, before: list[NodeStatus], after: list[NodeStatus]) -> Iterator[StageTime]:
    earlier, now = _stages(name, before), _stages(name, after)
    for stage in plan.stages:
        if stage.name not in now or stage.name not in earlier:
            raise NotFound(f"it does not serve stage {stage.name!r} of {name!r}", node=stage.node, remedy="deploy the plan again")
        a, b = earlier[stage.name], now[stage.name]
        count = max(b.requests - a.requests, 1)
        yield StageTime(
            stage.name,
            stage.node,
            predicted_s=stage.seconds,
            compute_s=(b.compute_s - a.compute_s) / count,
            wait_s=(b.wait_s - a.wait_s) / count,
            decode_s=(b.decode_s - a.decode_s) / count,
            encode_s=(b.encode_s - a.encode_s) / count,
            send_s=(b.send_s - a.send_s) / count,
        )


def _stages(name: str, nodes: list[NodeStatus]) -> dict[str, StageStatus]:
    return {stage.name: stage for node in nodes for d in node.deployments if d.name == name for stage in d.stages}


def report_text(plan: Plan, report: BenchReport) -> str:
    """Predicted beside measured, for people."""
    predicted = plan.prediction
    rows = [("", "predicted", "measured", "measured / predicted")]

    def row(what: str, expected: float | None, seen: float, text: Callable[[float], str]) -> None:
        rows.append((what, text(expected) if expected else "-", text(seen), f"{seen / expected:.2f}" if expected else "-"))

    def rate(figure: float) -> str:
        return f"{figure:.4g} batches/s"

    row("latency p50", predicted.latency_s if predicted else None, report.latency_p50_s, seconds_text)
    row("latency p95", None, report.latency_p95_s, seconds_text)
    row("throughput", predicted.throughput_per_s if predicted else None, report.throughput_per_s, rate)
    expected_bytes = dict(predicted.bytes_per_link) if predicted else {}
    for link in sorted({*expected_bytes, *report.bytes_per_link}):
        row(f"bytes {link}", expected_bytes.get(link), report.bytes_per_link.get(link, 0), bytes_text)
    for stage in report.stages:
        row(f"compute {stage.stage} on {stage.node}", stage.predicted_s, stage.compute_s, seconds_text)
    lines = [
        f"{plan.model}: {report.requests} requests one by one, {report.requests} with the pipeline full, batches of {report.batch}",
        "",
    ]
    lines += table(rows)
    if report.stages:
        times: list[tuple[str, ...]] = [("stage", "node", "wait", "decode", "compute", "encode", "send")]
        for s in report.stages:
            times.append((s.stage, s.node, *(seconds_text(t) for t in (s.wait_s, s.decode_s, s.compute_s, s.encode_s, s.send_s))))
        lines += ["", "measured per request, pipeline full", *table(times)]
    return "\n".join(lines)

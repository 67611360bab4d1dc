"""`splitnet bench`: real requests to a plan's deployment, and what the client and the nodes' own counters say of them."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from partitioner.bench_report import Alone, BenchReport, StageTime
from partitioner.sizes import dimension_size
from splitnet import background
from splitnet.channel import open_channel, stub, translated
from splitnet.errors import BadInput, BadPlan, BadShard, InsufficientMemory, NodeUnavailable, NotFound
from splitnet.install import default_name, deploy, status, undeploy
from splitnet.linkprobe import LinkMeasurement, measure_link
from splitnet.machine import machine_id, usable_processors
from splitnet.node_status import NodeStatus, StageStatus
from splitnet.plan import NodeRef, Plan
from splitnet.preflight import open_shards
from splitnet.shard import Shard
from splitnet.sync import Client
from splitnet.tensors import numpy_dtype

__all__ = ["BenchReport", "bench", "random_inputs", "served"]

_WARM_UP = 3
_CLIENT_BUDGET_S = 0.5

Inputs = Mapping[str, np.ndarray]
OnProgress = Callable[[int, int, str], None]
Shards = Mapping[str, Shard | str | Path]


def bench(
    plan: Plan,
    *,
    deployment: str = "",
    shards: Shards | None = None,
    against: Sequence[NodeRef] = (),
    requests: int = 40,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    timeout_s: float = 60.0,
    on_progress: OnProgress | None = None,
) -> BenchReport:
    """Sends `requests` requests one after another and as many at once to the plan's deployment (default: the name that `splitnet deploy`
    gives it). Inputs are random, see `random_inputs`; `sizes` gives the sizes of symbolic dimensions (default: those of the plan's
    prediction).

    With `shards`, a plan that is not deployed is deployed for as long as it takes, and each node of `against` serves the whole model alone
    afterwards, where it fits; all of that is removed again. Raises NodeUnavailable, NotFound where nothing is deployed and there are no
    shards, BadPlan where something else is deployed, and what a request fails with.
    """
    if requests < 2:
        raise BadInput(f"requests must be at least 2, got {requests}")
    if against and shards is None:
        raise BadInput("a comparison with one node needs the plan's shards", remedy="keep the folder PLAN.shards beside the plan")
    known = dict(plan.prediction.symbols) if plan.prediction else {}
    if plan.prediction:
        known.setdefault("batch", plan.prediction.batch)
    wanted = {**known, **(sizes or {})}
    run = _Run(random_inputs(plan, wanted, seed), requests, wanted.get("batch", 1), timeout_s, on_progress, 1 + len(against))
    name = deployment or default_name(plan.model)
    with served(plan, name, shards) as temporary:
        report = run.measure(plan, name, temporary)
    if not against:
        return report
    alone = []
    with tempfile.TemporaryDirectory(prefix="splitnet-bench-") as folder:
        from partitioner.merging import merge, on_one_node  # reads weights

        assert shards is not None
        whole = merge(plan, open_shards(plan, shards), Path(folder) / "whole")
        for node in against:
            alone.append(run.alone(on_one_node(plan, node).with_shards({"whole": whole.sha256}), {"whole": whole}))
    return report.with_alone(tuple(alone))


@contextlib.contextmanager
def served(plan: Plan, name: str, shards: Shards | None) -> Iterator[bool]:
    """Whether the plan had to be deployed for this. It is taken off again at the end, then."""
    there = [node for node in _status(plan) if node.deployment(name) is not None]
    if there:
        yield False
        return
    if shards is None:
        raise NotFound(
            f"no deployment {name!r} on the plan's nodes, and no shards to deploy it with",
            remedy="run `splitnet deploy` first, or keep the folder PLAN.shards beside the plan",
        )
    deploy(plan, shards, name=name)
    try:
        yield True
    finally:
        undeploy(plan, name)


class _Run:
    """The same requests for every deployment that is compared."""

    def __init__(
        self, inputs: Inputs, requests: int, batch: int, timeout_s: float, on_progress: OnProgress | None, deployments: int
    ) -> None:
        self._inputs = inputs
        self._requests = requests
        self._batch = batch
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._total = deployments * (_WARM_UP + 2 * requests)
        self._done = 0
        self._what = ""

    def measure(self, plan: Plan, name: str, temporary: bool) -> BenchReport:
        self._what = name
        with Client(plan.ingress.address, deployment=name, timeout_s=self._timeout_s) as client:
            if temporary is False and client.describe().plan_sha256 not in (plan.sha256, ""):
                raise BadPlan(f"the deployment {name!r} serves another plan", remedy="deploy this one with `splitnet deploy`")
            latencies, one_by_one = self._latencies(client, plan, name)
            before = _status(plan)
            spent_s = time.process_time()
            throughput = self._throughput(client)
            spent_s = time.process_time() - spent_s
            after = _status(plan)
        way = background.run(_client_way(plan.ingress.address))
        here = any(node.name == plan.ingress.name and node.machine == machine_id() for node in after)
        size = sum(array.nbytes for array in self._inputs.values()) + self._answer_bytes
        return BenchReport(
            model=plan.model,
            model_sha256=plan.model_sha256,
            plan=plan.to_json(),
            requests=self._requests,
            batch=self._batch,
            latency_p50_s=float(np.percentile(latencies, 50)),
            latency_p95_s=float(np.percentile(latencies, 95)),
            throughput_per_s=throughput,
            client_s=size / way.bandwidth_bytes_per_s + way.round_trip_s,
            client_cpu_s=spent_s / self._requests / usable_processors() if here else 0.0,
            bytes_per_link=_link_bytes(before, after, self._requests),
            reserved_bytes={node.name: sum(s.reserved_bytes for s in _stages(name, [node]).values()) for node in after},
            process_bytes={node.name: node.process_memory_bytes for node in after},
            stages=tuple(_split(plan, name, [before, after])),
            stages_alone=tuple(_split(plan, name, one_by_one)),
            deployed_for_this=temporary,
        )

    def alone(self, plan: Plan, shards: Shards) -> Alone:
        """The whole model on one node, deployed for as long as this takes."""
        node, name = plan.ingress, f"{default_name(plan.model)[:40]}-alone"
        self._what = f"{node.name} alone"
        try:
            with served(plan, name, shards), Client(node.address, deployment=name, timeout_s=self._timeout_s) as client:
                latencies, _ = self._latencies(client, plan, name)
                return Alone(node.name, float(np.percentile(latencies, 50)), float(np.percentile(latencies, 95)), self._throughput(client))
        except (InsufficientMemory, BadShard, NodeUnavailable) as error:
            return Alone(node.name, 0.0, 0.0, 0.0, why_not=error.message)

    def _latencies(self, client: Client, plan: Plan, name: str) -> tuple[list[float], list[list[NodeStatus]]]:
        """Seconds of each request, and what the nodes had counted before the first and after each."""
        latencies: list[float] = []
        counted: list[list[NodeStatus]] = []
        for k in range(_WARM_UP + self._requests):
            start = time.perf_counter()
            answer = client.infer(self._inputs)
            took = time.perf_counter() - start
            if k >= _WARM_UP:
                latencies.append(took)
            if k >= _WARM_UP - 1:
                counted.append(_status(plan))
            self._answer_bytes = sum(array.nbytes for array in answer.values())
            self._step()
        return latencies, counted

    def _throughput(self, client: Client) -> float:
        """Answers per second once the pipeline is full."""

        def feed() -> Iterator[Inputs]:
            for _ in range(self._requests):
                yield self._inputs

        arrivals = []
        for _ in client.stream(feed()):
            arrivals.append(time.perf_counter())
            self._step()
        filled = min(client.max_in_flight, self._requests // 4)
        return (len(arrivals) - 1 - filled) / max(arrivals[-1] - arrivals[filled], 1e-9)

    def _step(self) -> None:
        self._done += 1
        if self._on_progress:
            self._on_progress(self._done, self._total, self._what)


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


async def _client_way(address: str) -> LinkMeasurement:
    """The link from here to the ingress, which is the client's and in no plan."""
    async with open_channel(address) as channel:
        with translated(address):
            return await measure_link(stub(channel), _CLIENT_BUDGET_S)


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


def _split(plan: Plan, name: str, counted: Sequence[list[NodeStatus]]) -> Iterator[StageTime]:
    """Seconds per request of each stage: the median over the spans between two counts (one span: its mean)."""
    states = [_stages(name, nodes) for nodes in counted]
    for stage in plan.stages:
        if any(stage.name not in state for state in states):
            raise NotFound(f"it does not serve stage {stage.name!r} of {name!r}", node=stage.node, remedy="deploy the plan again")
        pairs = [(a[stage.name], b[stage.name]) for a, b in itertools.pairwise(states)]

        def seconds(what: str, pairs: list[tuple[StageStatus, StageStatus]] = pairs) -> float:
            return float(statistics.median((getattr(b, what) - getattr(a, what)) / max(b.requests - a.requests, 1) for a, b in pairs))

        yield StageTime(
            stage.name,
            stage.node,
            predicted_s=stage.seconds,
            compute_s=seconds("compute_s"),
            wait_s=seconds("wait_s"),
            decode_s=seconds("decode_s"),
            encode_s=seconds("encode_s"),
            send_s=seconds("send_s"),
        )


def _stages(name: str, nodes: list[NodeStatus]) -> dict[str, StageStatus]:
    return {stage.name: stage for node in nodes for d in node.deployments if d.name == name for stage in d.stages}

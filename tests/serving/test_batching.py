"""Requests that are joined and divided on real nodes: everybody gets the rows that are theirs, and nobody another's failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from raw_stream import RawStream
from small_models import Split, at_rest, chain, diamond, fragile, slow, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from splitnet import Batching, wire
from splitnet.commands import deploying
from splitnet.commands import install as commands
from splitnet.errors import BadInput, BadPlan, Cancelled, DeadlineExceeded, EngineFailure
from splitnet.install import deploy, status, undeploy
from splitnet.node_status import DeploymentStatus
from splitnet.rpc.v1 import node_pb2 as pb

HEAVY = 3000  # rows; some 0.3 s of computing in the second stage


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3) as nodes:
        yield nodes
        at_rest(nodes)


def close(answer: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    """Another batch size may be another kernel."""
    return answer.keys() == expected.keys() and all(
        answer[name].shape == expected[name].shape and np.allclose(answer[name], expected[name], atol=1e-5) for name in expected
    )


def equal(answer: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    return answer.keys() == expected.keys() and all(np.array_equal(answer[name], expected[name]) for name in expected)


def told(served: Split, name: str) -> DeploymentStatus:
    """What the ingress says."""
    return next(d for node in status(served.plan) if (d := node.deployment(name)) is not None and d.ingress)


def runs(served: Split, name: str) -> dict[str, int]:
    return {s.name: s.requests for node in status(served.plan) for d in node.deployments if d.name == name for s in d.stages}


async def test_small_requests_of_many_clients_are_joined(cluster: LocalCluster, tmp_path: Path) -> None:
    served = split(diamond(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="linear_1 tanh", c="*"), max_in_flight=64)
    await asyncio.to_thread(deploy, served.plan, served.shards, name="joined", batching=Batching(max_batch=8, max_delay_s=5.0))
    clients = [splitnet.AsyncClient(served.address, "joined") for _ in range(4)]
    inputs = [served.inputs(batch=1, seed=i) for i in range(16)]  # two full batches: nobody waits 5 s
    started = time.monotonic()
    answers = await asyncio.gather(*(clients[i % 4].infer(given) for i, given in enumerate(inputs)))
    assert time.monotonic() - started < 4.5
    for given, answer in zip(inputs, answers, strict=True):
        assert close(answer, served.whole(given))
        answer["early"][:] = 0.0  # everybody's answer is their own
    assert await asyncio.to_thread(runs, served, "joined") == {"stage0": 2, "stage1": 2, "stage2": 2}
    assert (await asyncio.to_thread(told, served, "joined")).batching == Batching(8, 5.0)
    for client in clients:
        await client.close()
    await asyncio.to_thread(undeploy, served.plan, "joined")
    at_rest(cluster)


async def test_a_lone_request_waits_for_company_no_longer_than_allowed(cluster: LocalCluster, tmp_path: Path) -> None:
    served = split(chain(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="*"))
    await asyncio.to_thread(deploy, served.plan, served.shards, name="patient", batching=Batching(max_batch=8, max_delay_s=0.3))
    async with splitnet.AsyncClient(served.address, "patient") as client:
        started = time.monotonic()
        assert equal(await client.infer(served.inputs(2)), served.whole(served.inputs(2)))
        assert time.monotonic() - started >= 0.29
    await asyncio.to_thread(undeploy, served.plan, "patient")
    at_rest(cluster)


def test_a_large_request_is_divided_and_put_together_again(cluster: LocalCluster, tmp_path: Path) -> None:
    """Piece by piece as if each had been asked for by itself, to the bit; tensors of several chunks too."""
    served = split(diamond(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="linear_1 tanh", c="*"), max_in_flight=1)
    deploy(served.plan, served.shards, name="divided", batching=Batching(microbatch=8))
    rows = wire.CHUNK_BYTES // 64
    with splitnet.Client(served.address, "divided") as client:
        for batch, pieces in ((3, 1), (8, 1), (21, 3)):
            before = runs(served, "divided")
            inputs = served.inputs(batch, seed=batch)
            answer = client.infer(inputs)
            assert {stage: count - before[stage] for stage, count in runs(served, "divided").items()} == dict.fromkeys(before, pieces)
            parts = [served.whole({k: v[i : i + 8] for k, v in inputs.items()}) for i in range(0, batch, 8)]
            assert equal(answer, {name: np.concatenate([part[name] for part in parts]) for name in answer})
            assert all(array.flags.writeable and array.flags.c_contiguous for array in answer.values())
    undeploy(served.plan, "divided")
    deploy(served.plan, served.shards, name="divided", batching=Batching(microbatch=rows))
    with splitnet.Client(served.address, "divided") as client:
        inputs = served.inputs(2 * rows + 5)
        assert close(client.infer(inputs), served.whole(inputs))
    undeploy(served.plan, "divided")
    at_rest(cluster)


async def test_one_bad_request_in_a_batch_fails_alone(cluster: LocalCluster, tmp_path: Path) -> None:
    served = split(fragile(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="gather", c="*"))
    await asyncio.to_thread(deploy, served.plan, served.shards, name="fragile", batching=Batching(max_batch=8, max_delay_s=2.0))
    good = [{**served.inputs(1, seed=i)} for i in range(8)]
    bad = {**good[3], "index": good[3]["index"] + 99}
    async with splitnet.AsyncClient(served.address, "fragile") as client:
        answers = await asyncio.gather(*(client.infer(bad if i == 3 else good[i]) for i in range(8)), return_exceptions=True)
    for i, answer in enumerate(answers):
        if i == 3:
            assert isinstance(answer, EngineFailure)
            assert (answer.node, answer.stage) == ("b", "stage1")
        else:
            assert isinstance(answer, dict), answer
            assert equal(answer, served.whole(good[i]))  # it went again, by itself
    assert (await asyncio.to_thread(runs, served, "fragile"))["stage0"] == 9  # all eight at once, then each
    await asyncio.to_thread(undeploy, served.plan, "fragile")
    at_rest(cluster)


async def test_a_bad_piece_fails_the_whole_request_and_no_other(cluster: LocalCluster, tmp_path: Path) -> None:
    served = split(fragile(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="gather", c="*"))
    await asyncio.to_thread(deploy, served.plan, served.shards, name="pieces", batching=Batching(max_batch=4, microbatch=4))
    good = served.inputs(40)
    bad = {"x": good["x"], "index": good["index"].copy()}
    bad["index"][17] = 99
    async with splitnet.AsyncClient(served.address, "pieces") as client:
        answers = await asyncio.gather(*(client.infer(inputs) for inputs in (good, bad, good)), return_exceptions=True)
    assert isinstance(answers[1], EngineFailure)
    for answer in (answers[0], answers[2]):
        assert isinstance(answer, dict), answer
        assert close(answer, served.whole(good))
    at_rest(cluster)
    await asyncio.to_thread(undeploy, served.plan, "pieces")


@pytest.fixture(scope="module")
def heavy(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Split:
    names = [v.name for v in slow().structure.vertices if v.name.startswith(("tanh", "linear_"))]
    last = slow().structure.outputs[0].value
    middle = " ".join(name for name in names if name != last)
    return split(
        slow(), cluster.cluster(), tmp_path_factory.mktemp("shards"), stages_by(a="linear relu", b=middle, c="*"), max_in_flight=32
    )


@pytest.fixture
def joining(cluster: LocalCluster, heavy: Split) -> Iterator[Split]:
    """Two requests of half a batch are one."""
    deploy(heavy.plan, heavy.shards, name="heavy", batching=Batching(max_batch=HEAVY, max_delay_s=30.0))
    yield heavy
    undeploy(heavy.plan, "heavy", drain_s=0.0)
    at_rest(cluster)


async def computing(cluster: LocalCluster) -> None:
    """Returns when the batch is at the second stage's node."""
    while not len(cluster.server("b").ledger.requests):  # it lives in another thread
        await asyncio.sleep(0.005)


async def test_a_deadline_or_a_cancellation_takes_its_rows_only(cluster: LocalCluster, joining: Split) -> None:
    third = joining.inputs(HEAVY // 3)
    async with RawStream(joining.address) as stream, splitnet.AsyncClient(joining.address, "heavy") as client:
        kept = asyncio.create_task(client.infer(third))
        await stream.send_inputs("late", third, timeout_s=0.1)
        await stream.send_inputs("unwanted", third)
        await computing(cluster)
        await stream.send(request="unwanted", cancel=pb.Cancel(reason="no longer wanted"))
        assert isinstance(await stream.answer("late"), DeadlineExceeded)
        assert len(cluster.server("b").ledger.requests) == 1  # the batch goes on, for the third
        assert close(await kept, joining.whole(third))
    assert (await asyncio.to_thread(runs, joining, "heavy"))["stage2"] == 1


async def test_a_client_that_disappears_takes_nobody_with_it(cluster: LocalCluster, joining: Split) -> None:
    half = joining.inputs(HEAVY // 2)
    async with splitnet.AsyncClient(joining.address, "heavy") as client:
        async with RawStream(joining.address) as stream:
            await stream.send_inputs("gone", half)
            kept = asyncio.create_task(client.infer(half))
            await computing(cluster)
        assert close(await kept, joining.whole(half))


async def test_a_batch_that_nobody_wants_any_more_is_given_up_everywhere(cluster: LocalCluster, joining: Split) -> None:
    half = joining.inputs(HEAVY // 2)
    async with RawStream(joining.address) as stream:
        await stream.send_inputs("one", half)
        await stream.send_inputs("two", half)
        await computing(cluster)
        for request in ("one", "two"):
            await stream.send(request=request, cancel=pb.Cancel(reason="no longer wanted"))
        at_rest(cluster, timeout_s=0.3)


async def test_those_in_line_are_told_when_their_deployment_goes(cluster: LocalCluster, joining: Split) -> None:
    async with RawStream(joining.address) as stream:
        await stream.send_inputs("waiting", joining.inputs(1))
        while (await asyncio.to_thread(told, joining, "heavy")).waiting < 1:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(undeploy, joining.plan, "heavy", drain_s=0.0)
        assert isinstance(await stream.answer("waiting"), Cancelled)
    await asyncio.to_thread(deploy, joining.plan, joining.shards, name="heavy")


async def test_clients_take_turns_and_the_urgent_goes_first(cluster: LocalCluster, heavy: Split) -> None:
    """One client has filled the line; another's request, and an urgent one, are answered long before its last."""
    await asyncio.to_thread(deploy, heavy.plan, heavy.shards, name="turns")
    order: list[str] = []

    async def ask(client: splitnet.AsyncClient, name: str, priority: int = 0) -> None:
        await client.infer(heavy.inputs(200), priority=priority)
        order.append(name)

    async with splitnet.AsyncClient(heavy.address, "turns") as many, splitnet.AsyncClient(heavy.address, "turns") as one:
        first = [asyncio.create_task(ask(many, "many")) for _ in range(28)]
        while (await asyncio.to_thread(told, heavy, "turns")).waiting < 12:
            await asyncio.sleep(0.002)
        later = [asyncio.create_task(ask(one, "one")), asyncio.create_task(ask(many, "urgent", priority=9))]
        await asyncio.gather(*first, *later)
    assert order.index("one") < 26
    assert order.index("urgent") < 26
    await asyncio.to_thread(undeploy, heavy.plan, "turns")
    at_rest(cluster)


async def test_a_priority_that_is_none_is_refused(cluster: LocalCluster, heavy: Split) -> None:
    await asyncio.to_thread(deploy, heavy.plan, heavy.shards, name="urgent")
    async with splitnet.AsyncClient(heavy.address, "urgent") as client, RawStream(heavy.address) as stream:
        with pytest.raises(BadInput, match="priority"):
            await client.infer(heavy.inputs(1), priority=10)
        await stream.send_inputs("urgent", heavy.inputs(1), priority=10)
        refusal = await stream.answer("urgent")
        assert isinstance(refusal, BadInput)
        assert "priority" in refusal.message
    await asyncio.to_thread(undeploy, heavy.plan, "urgent")


@pytest.mark.parametrize(
    ("batching", "message"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"microbatch": -1}, "microbatch"),
        ({"max_batch": 2, "max_delay_s": float("nan")}, "max_delay_s"),
        ({"max_delay_s": 0.1}, "without max_batch"),
    ],
)
def test_settings_that_make_no_sense_are_refused(batching: dict[str, float], message: str) -> None:
    with pytest.raises(BadPlan, match=message):
        Batching(**batching)  # type: ignore[arg-type] # as a caller without a type checker might


def test_the_command_sets_what_status_shows(cluster: LocalCluster, tmp_path: Path) -> None:
    served = split(chain(), cluster.cluster(), tmp_path / "plan.shards", stages_by(a="linear relu", b="*"))
    served.plan.save(tmp_path / "plan.json")
    run, plan = CliRunner(), str(tmp_path / "plan.json")
    refused = run.invoke(deploying.deploy, [plan, "--max-delay", "2parsecs"])
    assert (refused.exit_code, "2parsecs" in refused.output) == (2, True)
    done = run.invoke(deploying.deploy, [plan, "--name", "set", "--max-batch", "8", "--max-delay", "2ms", "--microbatch", "4"])
    assert done.exit_code == 0, done.output
    assert told(served, "set").batching == Batching(8, 0.002, 4)
    shown = run.invoke(commands.status, ["--cluster", plan]).output
    assert "set: requests are joined up to 8 rows, and wait up to 2 ms for it; larger ones go in pieces of 4 rows" in shown
    undeploy(served.plan, "set")

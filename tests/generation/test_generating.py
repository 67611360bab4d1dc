"""Client, ingress, scheduler and stages together, with a model whose every token hangs on all that the caches should hold."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from raw_stream import RawStream
from small_engine import NAME, SmallEngine, SmallModel, serve

import splitnet
from nodes.clients import ClientStream
from nodes.engines.decoder.steps import Sampling
from nodes.generation.generator import Generator
from nodes.generation.passes import Making
from nodes.testing import LocalCluster
from splitnet.errors import BadInput, DeadlineExceeded, EngineFailure, Overloaded
from splitnet.generation import GenerateRequest
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.wire import tensor_chunks

MODEL = SmallModel()
CONTEXT, SESSIONS = 512, 8


@pytest.fixture(scope="module")
def engines(cluster: LocalCluster) -> list[SmallEngine]:
    return serve(cluster, MODEL, context=CONTEXT, sessions=SESSIONS)


@pytest.fixture
def address(cluster: LocalCluster, engines: list[SmallEngine]) -> Iterator[str]:
    yield cluster.addresses["a"]
    settled(cluster, engines)


def generator(cluster: LocalCluster, name: str = NAME) -> Generator:
    found = cluster.server("a").ledger.deployments[name].generator
    assert found is not None
    return found


def settled(cluster: LocalCluster, engines: list[SmallEngine], name: str = NAME) -> None:
    """Nothing is held but what is kept for other prompts, and the stages hold just that."""
    here = generator(cluster, name)

    def at_rest() -> bool:
        kept = {session.handle for session in here.slots.kept}
        busy = here.slots.live or here.passes or any(len(cluster.server(n).ledger.requests) for n in cluster.names)
        stages = [s for n in cluster.names for s in cluster.server(n).ledger.deployments[name].stages.values()]
        return not busy and all(set(stage.sessions._handles) <= kept for stage in stages)

    until(at_rest)
    assert all(len(engine._figures) <= len(here.slots.kept) for engine in engines)
    assert here.slots.free == here.slots.total
    assert not cluster.server("a").ledger.buffers.used_bytes


def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(MODEL.vocabulary), k=length)


def test_tokens_are_those_of_the_whole_model(address: str) -> None:
    with splitnet.Client(address, NAME) as client:
        for length, count in ((1, 1), (1, 7), (5, 30), (300, 12)):
            ids = prompt(length, length)
            assert list(client.generate(ids, count)) == MODEL.generate(ids, count)


def test_sampling_hangs_on_the_seed_alone(address: str) -> None:
    ids = prompt(20)
    options = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.3, "seed": 11}
    alone = MODEL.generate(ids, 25, Sampling(np.float32(0.8).item(), np.float32(0.9).item(), 20, np.float32(1.3).item(), 11))
    with splitnet.Client(address, NAME) as client:
        assert list(client.generate(ids, 25, **options)) == alone
        assert list(client.generate(ids, 25, **(options | {"seed": 12}))) != alone
        assert len(list(client.generate(ids, 25, temperature=1.0))) == 25  # without a seed: some text


async def test_many_sessions_at_once_do_not_disturb_each_other(address: str) -> None:
    wanted = [(prompt(random.Random(i).randrange(1, 60), i), 5 + i % 20) for i in range(16)]
    async with splitnet.AsyncClient(address, NAME) as client:

        async def run(ids: list[int], count: int) -> list[int]:
            return [token async for token in client.generate(ids, count, retry=True)]

        answers = await asyncio.gather(*(run(*each) for each in wanted))
    assert answers == [MODEL.generate(*each) for each in wanted]


def test_a_stream_says_how_it_ended(address: str, cluster: LocalCluster) -> None:
    ids = prompt(40, 3)
    whole = MODEL.generate(ids, 12)

    async def run() -> None:
        async with splitnet.AsyncClient(address, NAME) as client:
            stream = client.generate(ids, 12)
            assert [token async for token in stream] == whole
            assert (stream.finish, stream.prompt_tokens) == ("length", 40)
            async with client.generate(ids, 12, stop=[whole[4]]) as stream:
                first = whole.index(whole[4])
                assert [token async for token in stream] == whole[: first + 1]
                assert (stream.finish, stream.cached_tokens) == ("stop", 39)
            async with client.generate(np.array(ids), 12, stop=[[whole[2], 99, 1], whole[5:8]]) as stream:
                assert [token async for token in stream] == whole[:8]

    asyncio.run(run())


def test_a_prompt_that_begins_like_another_is_not_computed_again(address: str, cluster: LocalCluster, engines: list[SmallEngine]) -> None:
    system = prompt(200, 5)
    with splitnet.Client(address, NAME) as client:
        first = list(client.generate([*system, 1, 2], 4))
        before = sum(engines[1].passes)
        assert list(client.generate([*system, 3], 4)) == MODEL.generate([*system, 3], 4)  # forked
        assert sum(engines[1].passes) - before < 40
        turn = [*system, 1, 2, *first, 7, 8, 9]
        assert list(client.generate(turn, 4)) == MODEL.generate(turn, 4)  # goes on where the first one ended
        assert sum(engines[1].passes) - before < 70


async def test_prompts_that_come_together_share_what_they_begin_with(address: str, engines: list[SmallEngine]) -> None:
    system = prompt(300, 8)
    before = sum(engines[0].passes)
    async with splitnet.AsyncClient(address, NAME) as client:

        async def run(last: int) -> list[int]:
            return [token async for token in client.generate([*system, last], 2)]

        answers = await asyncio.gather(*map(run, range(4)))
    assert answers == [MODEL.generate([*system, last], 2) for last in range(4)]
    assert sum(engines[0].passes) - before < 2 * len(system)


def test_a_client_that_stops_frees_its_caches(address: str, cluster: LocalCluster) -> None:
    with splitnet.Client(address, NAME) as client:
        stream = client.generate(prompt(10, 9), 400)
        ids = [next(stream) for _ in range(3)]
        assert ids == MODEL.generate(prompt(10, 9), 3)
        stream.close()
        until(lambda: not generator(cluster).slots.live)
    with splitnet.Client(address, NAME) as client:
        next(client.generate(prompt(10, 10), 400))  # and goes away
    until(lambda: not generator(cluster).slots.live)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.1, "seed": 5}])
async def test_guesses_follow_guesses_that_are_not_verified_yet(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, options: dict[str, float]
) -> None:
    """A text that goes round in circles, and sometimes does not; stages that wait for each other."""
    model = SmallModel(order=1, vocabulary=13, pass_s=0.002)
    engines = serve(cluster, model, name="circles")
    under_way = 0
    send = Generator._send

    def counting(self: Generator, making: Making) -> None:
        nonlocal under_way
        send(self, making)
        under_way = max(under_way, sum(making.entries[0].session is entry.session for each in self.passes for entry in each.entries))

    monkeypatch.setattr(Generator, "_send", counting)
    sampling = Sampling(np.float32(options.get("temperature", 0)).item(), seed=int(options.get("seed", 0)))
    async with splitnet.AsyncClient(cluster.addresses["a"], "circles") as client:
        for ids in ([3], [7, 7, 1, 2]):
            wanted = dataclasses.replace(model, pass_s=0).generate(ids, 150, sampling)
            assert [token async for token in client.generate(ids, 150, **options)] == wanted
        async with client.generate([5], 400, **options) as stream:  # and goes away while guesses are under way
            assert await anext(stream) == dataclasses.replace(model, pass_s=0).generate([5], 1, sampling)[0]
    settled(cluster, engines, "circles")
    counts = generator(cluster, "circles").counts
    assert under_way > 2
    assert counts.passes < 150
    assert counts.drafted_tokens >= counts.accepted_tokens > 100
    assert bool(options) == (counts.drafted_tokens > counts.accepted_tokens)  # a draw leaves the circle now and then


def test_a_deadline_ends_it(cluster: LocalCluster) -> None:
    slow = SmallModel(pass_s=0.02)
    engines = serve(cluster, slow, name="slow")
    with splitnet.Client(cluster.addresses["a"], "slow") as client:
        came = []
        with pytest.raises(DeadlineExceeded):
            for token in client.generate([1, 2, 3], 500, timeout_s=0.5):
                came.append(token)
    assert came == slow.generate([1, 2, 3], len(came))
    assert came
    settled(cluster, engines, "slow")


def test_without_room_it_is_refused_at_once(cluster: LocalCluster) -> None:
    engines = serve(cluster, SmallModel(pass_s=0.005), context=64, sessions=1, name="tight")
    with splitnet.Client(cluster.addresses["a"], "tight") as client:
        first = client.generate([1] * 10, 40)
        begun = [next(first)]
        with pytest.raises(Overloaded, match="slots of the caches") as refused:
            list(client.generate([2] * 10, 20))
        assert refused.value.retry_after_s > 0
        assert list(client.generate([2] * 10, 20, retry=True)) == SmallModel().generate([2] * 10, 20)
        assert begun + list(first) == SmallModel().generate([1] * 10, 40)
    settled(cluster, engines, "tight")


def test_the_models_own_end(cluster: LocalCluster) -> None:
    model = SmallModel(eos=7)
    engines = serve(cluster, model, name="ends")
    ids = next([i] for i in range(60) if 7 in MODEL.generate([i], 60)[:-1])
    whole = MODEL.generate(ids, 60)
    with splitnet.Client(cluster.addresses["a"], "ends") as client:
        assert client.text is not None
        assert client.text.eos_token_ids == (7,)
        assert list(client.generate(ids, 60)) == whole[: whole.index(7) + 1]
        assert list(client.generate(ids, 60, ignore_eos=True)) == whole
    settled(cluster, engines, "ends")


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_a_pass_that_fails_is_made_again_by_the_sessions_one_by_one(address: str, engines: list[SmallEngine], stage: int) -> None:
    wanted = [(prompt(30, 40 + i), 20) for i in range(4)]
    async with splitnet.AsyncClient(address, NAME) as client:

        async def run(ids: list[int], count: int) -> list[int]:
            return [token async for token in client.generate(ids, count)]

        tasks = [asyncio.create_task(run(*each)) for each in wanted]
        await asyncio.sleep(0.02)
        engines[stage].trouble = EngineFailure("a bit fell over")
        assert await asyncio.gather(*tasks) == [MODEL.generate(*each) for each in wanted]


async def test_a_stage_that_forgets_its_caches_gets_them_again(address: str, engines: list[SmallEngine]) -> None:
    async with splitnet.AsyncClient(address, NAME) as client:
        stream = client.generate(prompt(30, 50), 100)
        came = [await anext(stream) for _ in range(5)]
        for kept in (engines[1]._figures, engines[1]._tokens, engines[1]._sampling):
            kept.clear()
        came += [token async for token in stream]
    assert came == MODEL.generate(prompt(30, 50), 100)


def test_stages_whose_ingress_has_gone_keep_nothing(address: str, cluster: LocalCluster) -> None:
    ids = prompt(40, 60)
    with splitnet.Client(address, NAME) as client:
        assert list(client.generate(ids, 5)) == MODEL.generate(ids, 5)
        for name in ("b", "c"):
            ledger = cluster.server(name).ledger
            deployment = ledger.deployments[NAME]
            ledger.loop.call_soon_threadsafe(ledger.forget_sessions, deployment)
            until(lambda held=deployment: not any(len(stage.sessions) for stage in held.stages.values()))
        assert list(client.generate(ids, 8)) == MODEL.generate(ids, 8)  # from the beginning, again


@pytest.mark.parametrize(
    ("ids", "count", "options", "message"),
    [
        ([], 1, {}, "the prompt is empty"),
        ([1, 61], 1, {}, "token id 61; the vocabulary has the ids 0 to 60"),
        ([-1], 1, {}, "token id -1"),
        ([[1], [2]], 1, {}, "shape"),
        ([0.5], 1, {}, "whole numbers"),
        ([1] * 512, 1, {}, "the prompt has 512 tokens, the deployment's context holds 512"),
        ([1] * 500, 13, {}, "max_new_tokens: 13 after a prompt of 500"),
        ([1], 0, {}, "max_new_tokens"),
        ([1], True, {}, "max_new_tokens"),
        ([1], 1, {"temperature": -0.1}, "temperature"),
        ([1], 1, {"temperature": float("nan")}, "temperature"),
        ([1], 1, {"top_p": 0}, "top_p"),
        ([1], 1, {"top_k": -1}, "top_k"),
        ([1], 1, {"repetition_penalty": 0}, "repetition_penalty"),
        ([1], 1, {"seed": -1}, "seed"),
        ([1], 1, {"stop": [[]]}, "stop"),
        ([1], 1, {"priority": 10}, "priority"),
    ],
)
def test_what_cannot_be_is_refused(address: str, ids: object, count: int, options: dict[str, object], message: str) -> None:
    with splitnet.Client(address, NAME) as client, pytest.raises(BadInput, match=message):
        list(client.generate(ids, count, **options))  # type: ignore[arg-type]


def test_a_client_that_does_not_read_loses_its_session(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it is bounded."""
    monkeypatch.setattr("nodes.generation.desk._MOST_UNSENT", 50)
    engines = serve(cluster, MODEL, context=1 << 12, name="unread")
    client = cluster._loop.run(_ask_and_never_read(cluster, GenerateRequest(4000)))
    until(lambda: not client.calls)
    assert client.outbox.backlog == 1  # it is told why, should it ever read
    assert 50 < generator(cluster, "unread").counts.new_tokens < 200
    settled(cluster, engines, "unread")


async def _ask_and_never_read(cluster: LocalCluster, wanted: GenerateRequest) -> ClientStream:
    head, payload = next(tensor_chunks("input_ids", np.array([1, 2, 3])))
    frame = pb.Frame(request="a", deployment="unread", tensor=head, generate=wanted.to_message(), end=True)
    client = ClientStream()  # whose outbox nobody empties
    await cluster.server("a")._servicer._ingress.receive(client, frame, payload)
    return client


def test_a_deployment_does_what_it_was_made_for(address: str) -> None:
    with splitnet.Client(address, NAME) as client, pytest.raises(BadInput, match="only generates text"):
        client.infer({"input_ids": np.array([1, 2])})


async def test_options_that_no_client_would_send_are_refused(address: str) -> None:
    async with RawStream(address) as stream:
        for request, options in (
            ("a", {"max_new_tokens": 3, "temperature": -1.0}),
            ("b", {"max_new_tokens": 0}),
            ("c", {"max_new_tokens": 600}),
        ):
            head, payload = next(tensor_chunks("input_ids", np.array([1, 2])))
            await stream.send(payload, request=request, deployment=NAME, tensor=head, generate=pb.Generate(**options), end=True)  # type: ignore[arg-type]
            answer = await stream.answer(request)
            assert isinstance(answer, BadInput)

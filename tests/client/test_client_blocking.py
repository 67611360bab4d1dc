"""The blocking client: the same surface, from any thread."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from scripted_node import ScriptedNode, ThreadedNode, X

from splitnet.client import AsyncClient
from splitnet.errors import BadInput, Cancelled, DeadlineExceeded, EngineFailure, NodeUnavailable
from splitnet.sync import Client


async def never(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    await asyncio.Event().wait()
    raise AssertionError


async def same(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if inputs["x"][0, 0] == 13:
        raise EngineFailure("unlucky")
    await asyncio.sleep(0.001)
    return {"y": inputs["x"]}


@pytest.fixture
def node() -> Iterator[ScriptedNode]:
    with ThreadedNode(ScriptedNode(same)) as threaded:
        yield threaded.node


def batch(number: int) -> np.ndarray:
    return np.full((1, 4), number, np.float32)


def until(condition: Any) -> None:
    limit = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_an_answer(node: ScriptedNode) -> None:
    with Client(node.address) as client:
        np.testing.assert_array_equal(client.infer({"x": batch(3)})["y"], batch(3))
        assert client.inputs == (X,)
        assert [spec.name for spec in client.outputs] == ["y"]
        assert (client.max_in_flight, client.address, client.describe().model) == (4, node.address, "test")


def test_without_a_with_block(node: ScriptedNode) -> None:
    client = Client(node.address)
    assert client.max_in_flight == 4
    client.infer(batch(1))
    client.close()
    client.close()
    with pytest.raises(BadInput, match="the client is closed"):
        client.infer(batch(1))


def test_the_surface_is_that_of_the_asynchronous_client() -> None:
    def surface(cls: type) -> dict[str, list[str]]:
        methods = {name: member for name, member in vars(cls).items() if not name.startswith("_") and callable(member)}
        return {name: list(inspect.signature(member).parameters) for name, member in methods.items()}

    internal = {"window", "infer_batch"}  # what the blocking client's stream is made of
    assert surface(Client) == {name: parameters for name, parameters in surface(AsyncClient).items() if name not in internal}
    assert list(inspect.signature(Client).parameters) == list(inspect.signature(AsyncClient).parameters)


def test_many_threads_at_once(node: ScriptedNode) -> None:
    with Client(node.address) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: int(client.infer(batch(i))["y"][0, 0]), range(100, 300)))
    assert answers == list(range(100, 300))
    assert node.streams == 1


def test_several_clients_in_several_threads_are_quiet(node: ScriptedNode, capfd: pytest.CaptureFixture[str]) -> None:
    """gRPC wakes every event loop of a process for each event; what the others then find must not be reported as an error."""

    def use(seed: int) -> int:
        with Client(node.address) as client:
            return sum(int(client.infer(batch(seed))["y"][0, 0]) for _ in range(50))

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(use, range(100, 106))) == [50 * seed for seed in range(100, 106)]
    assert "Error" not in capfd.readouterr().err


def test_stream(node: ScriptedNode) -> None:
    with Client(node.address) as client:
        assert [int(y["y"][0, 0]) for y in client.stream(batch(i) for i in range(100, 150))] == list(range(100, 150))
        assert 1 < node.peak <= 4
        assert list(client.stream([])) == []
        assert len(list(client.stream([batch(1)] * 5, window=1))) == 5
        with pytest.raises(BadInput, match="window"):
            next(client.stream([batch(1)], window=0))


def test_an_endless_stream_is_read_lazily_and_in_the_calling_thread(node: ScriptedNode) -> None:
    pulled, threads = 0, set()

    def endless() -> Iterator[np.ndarray]:
        nonlocal pulled
        while True:
            pulled += 1
            threads.add(threading.current_thread())
            yield batch(100)

    with Client(node.address) as client:
        answers = client.stream(endless())
        for taken in range(1, 20):
            next(answers)
            assert pulled <= taken + 4
        answers.close()
        until(lambda: node.under_way == 0)
    assert threads == {threading.current_thread()}


def test_the_error_of_a_batch_comes_at_its_place(node: ScriptedNode) -> None:
    seen: list[int] = []
    with Client(node.address) as client:
        with pytest.raises(EngineFailure, match="batch 13: unlucky") as caught:
            seen.extend(int(outputs["y"][0, 0]) for outputs in client.stream(batch(i) for i in range(20)))
        assert caught.value.batch == 13
    assert seen == list(range(13))


def test_the_callers_own_error_comes_after_the_answers_before_it(node: ScriptedNode) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield batch(0)
        yield batch(1)
        raise KeyError("mine")

    seen: list[int] = []
    with Client(node.address) as client, pytest.raises(KeyError, match="mine"):
        seen.extend(int(outputs["y"][0, 0]) for outputs in client.stream(broken()))
    assert seen == [0, 1]


def test_a_deadline(node: ScriptedNode) -> None:
    node.compute = never
    with Client(node.address) as client:
        with pytest.raises(DeadlineExceeded):
            client.infer(batch(1), timeout_s=0.1)
        until(lambda: node.under_way == 0)


def test_closing_from_another_thread(node: ScriptedNode) -> None:
    node.compute = never
    client = Client(node.address)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.infer, batch(1))
        until(lambda: node.under_way)
        client.close()
        with pytest.raises(Cancelled, match="the client was closed"):
            waiting.result(5)


def test_an_interrupt_cancels_the_request(node: ScriptedNode) -> None:
    node.compute = never
    with Client(node.address) as client:

        def interrupt() -> None:
            until(lambda: node.under_way)
            signal.pthread_kill(
                threading.main_thread().ident or 0, signal.SIGINT
            )  # to the process, any thread might take it, and wake nobody

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.infer(batch(1))
        thread.join()
        until(lambda: node.cancelled and node.under_way == 0)


def test_no_node_there_leaves_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(NodeUnavailable), Client("127.0.0.1:9"):
        pass
    assert threading.active_count() == before


def test_a_program_that_forgets_to_close_ends_quietly(node: ScriptedNode) -> None:
    program = """
import sys, numpy as np
from splitnet.sync import Client
client = Client(sys.argv[1])
client.infer(np.ones((1, 4), np.float32))
print("done")
"""
    ended = subprocess.run([sys.executable, "-c", program, node.address], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")

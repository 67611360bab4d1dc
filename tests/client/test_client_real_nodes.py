"""The client against three real nodes that serve two real models."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_models import Split

from nodes.testing import LocalCluster
from splitnet import AsyncClient, Client
from splitnet.errors import BadInput, DeadlineExceeded, NotFound, NotPermitted


def same(answer: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert answer.keys() == expected.keys()
    for name, array in expected.items():
        assert answer[name].dtype == array.dtype
        np.testing.assert_array_equal(answer[name], array)


def test_answers_are_the_whole_models(chain: Split, diamond: Split) -> None:
    for made, name in ((chain, "chain"), (diamond, "diamond")):
        with Client(made.address, name) as client:
            assert client.inputs == made.plan.inputs
            assert client.outputs == tuple(output.spec for output in made.plan.outputs)
            for batch in (1, 2, 7):
                same(client.infer(made.inputs(batch)), made.whole(made.inputs(batch)))


async def test_many_at_once_from_several_clients(chain: Split, diamond: Split) -> None:
    async def use(made: Split, name: str, seed: int) -> None:
        async with AsyncClient(made.address, name) as client:
            batches = [made.inputs(1 + i % 3, seed + i) for i in range(20)]
            index = 0
            async for outputs in client.stream(batches):
                same(outputs, made.whole(batches[index]))
                index += 1
            assert index == 20

    await asyncio.gather(*(use(made, name, seed) for made, name in ((chain, "chain"), (diamond, "diamond")) for seed in (0, 100)))


def test_threads_share_a_blocking_client(chain: Split) -> None:
    with Client(chain.address, "chain") as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: client.infer(chain.inputs(2, seed), retry=True), range(40)))
    for seed, answer in enumerate(answers):
        same(answer, chain.whole(chain.inputs(2, seed)))


def test_not_a_number_goes_through(chain: Split) -> None:
    x = chain.inputs(1)["x"]
    x[0, 0] = np.nan
    with Client(chain.address, "chain") as client:
        assert np.isnan(client.infer(x)["output"]).all()


def test_what_is_wrong_is_said_before_it_is_sent(diamond: Split) -> None:
    with Client(diamond.address, "diamond") as client:
        good = diamond.inputs(2)
        for wrong, message in (
            ({"x": good["x"]}, "input 'y' is missing"),
            (good | {"z": good["x"]}, "no input 'z'"),
            (good | {"y": good["y"][:1]}, "in another input"),
            (good | {"y": good["y"].astype(np.float64)}, "expected float32, got float64"),
        ):
            with pytest.raises(BadInput, match=message):
                client.infer(wrong)
        same(client.infer(good), diamond.whole(good))


def test_a_later_stage_says_where_to_go(nodes: LocalCluster, chain: Split) -> None:
    with pytest.raises(NotPermitted, match="serves a later stage of 'chain'") as caught, Client(nodes.addresses["b"], "chain"):
        pass
    assert caught.value.remedy == f"connect to {nodes.addresses['a']}"


def test_the_deployment_must_be_named_among_several(chain: Split, diamond: Split) -> None:
    with pytest.raises(NotFound, match=r"several deployments are at .*: 'chain', 'diamond'"), Client(chain.address):
        pass


def test_a_deadline_frees_the_pipeline(chain: Split) -> None:
    with Client(chain.address, "chain") as client:
        for _ in range(5):  # more than may be in flight
            with pytest.raises(DeadlineExceeded):
                client.infer(chain.inputs(1), timeout_s=1e-4)
        same(client.infer(chain.inputs(1), retry=True), chain.whole(chain.inputs(1)))


def test_a_client_loads_neither_torch_nor_the_planner() -> None:
    program = "import sys, splitnet.sync; print([m for m in ('torch', 'networkx', 'partitioner', 'nodes', 'click', 'psutil') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"

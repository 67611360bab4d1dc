"""A node that is gone although no connection says so is found out: a cable that is cut, in one direction or both, a process that is stopped."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from severing import Cable
from small_models import Split, chain, slow, split, stages_by

import splitnet
from nodes.link import Link
from nodes.testing import LocalCluster
from splitnet.install import deploy
from splitnet.plan import NodeRef

PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(3) as nodes:
        yield nodes


def through(cut: Split, node: str, address: str) -> Split:
    """The same, with all others reaching `node` at another address."""
    nodes = tuple(NodeRef(n.name, address if n.name == node else n.address) for n in cut.plan.nodes)
    return dataclasses.replace(cut, plan=dataclasses.replace(cut.plan, nodes=nodes))


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def link(cluster: LocalCluster, source: str, target: str, address: str) -> Link:
    (found,) = [k for k in cluster.server(source)._links if k.target.name == target and k.target.address == address]
    return found


@pytest.mark.parametrize(("there", "back"), [(True, True), (True, False), (False, True)])
async def test_a_link_that_carries_nothing_or_one_way_only(cluster: LocalCluster, tmp_path: Path, there: bool, back: bool) -> None:
    name = f"cut{there:d}{back:d}"
    plain = split(chain(), cluster.cluster(), tmp_path, stages_by(a="linear relu", b="*"))
    with Cable(cluster.addresses["b"]) as cable:
        cut = through(plain, "b", cable.address)
        await asyncio.to_thread(deploy, cut.plan, cut.shards, name=name)
        found = link(cluster, "a", "b", cable.address)
        async with splitnet.AsyncClient(cut.address, name) as client:
            given = cut.inputs()
            assert np.array_equal((await client.infer(given))["output"], cut.whole(given)["output"])
            await until(lambda: found.process != "")
            cable.cut(there=there, back=back)
            await until(lambda: not found.connected)
            cable.mend()
            await until(lambda: found.connected)
            assert np.array_equal((await client.infer(given))["output"], cut.whole(given)["output"])
        await asyncio.to_thread(splitnet.undeploy, cut.plan, name)


async def test_a_node_that_computes_for_long_still_answers(cluster: LocalCluster, tmp_path: Path) -> None:
    cut = split(slow(), cluster.cluster(), tmp_path, stages_by(a="linear relu", c="*"))
    await asyncio.to_thread(deploy, cut.plan, cut.shards, name="busy")
    async with splitnet.AsyncClient(cut.address, "busy") as client:
        given = cut.inputs(8000)  # some 0.8 s in one operator after the other: twice the patience
        assert np.array_equal((await client.infer(given))["output"], cut.whole(given)["output"])
    assert link(cluster, "a", "c", cluster.addresses["c"]).connected
    await asyncio.to_thread(splitnet.undeploy, cut.plan, "busy")

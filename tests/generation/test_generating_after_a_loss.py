"""A node is lost with its caches in the middle of answers: they go on with the very tokens that they would have had."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

from tiny_llama import deploy_tiny_llama

import splitnet
from nodes.testing import LocalCluster

COUNT = 60


async def test_a_standby_builds_the_caches_anew(tmp_path: Path) -> None:
    with LocalCluster(4) as nodes:
        served = await asyncio.to_thread(deploy_tiny_llama, nodes, tmp_path)
        stages = tuple(dataclasses.replace(stage, replicas=() if i == 0 else ("d",)) for i, stage in enumerate(served.plan.stages))
        plan = dataclasses.replace(served.plan, stages=stages)
        await asyncio.to_thread(splitnet.deploy, plan, tmp_path / "shards", name="kept")
        prompt = [5, 9, 2, 7]
        came: list[int] = []
        begun = asyncio.Event()

        async def ask(client: splitnet.AsyncClient) -> None:
            async with client.generate(prompt, COUNT) as stream:
                async for token in stream:
                    came.append(token)
                    if len(came) > 5:
                        begun.set()

        async with splitnet.AsyncClient(served.address, "kept") as client:
            asked = asyncio.create_task(ask(client))
            await begun.wait()
            await asyncio.to_thread(nodes.kill, "b")
            assert len(came) < COUNT, "nothing was under way any more"
            await asked
        assert came == served.greedy(prompt, COUNT)
        assert "replaced" in [event.kind for event in nodes.server("a").ledger.events]

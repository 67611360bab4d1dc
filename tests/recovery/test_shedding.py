"""Where there is no place for an urgent request, the least urgent of those that wait makes room."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from small_models import at_rest, slow, split, stages_by

import splitnet
from nodes.testing import LocalCluster
from splitnet.errors import Overloaded
from splitnet.install import deploy

PLACES = 8


async def test_priorities_shed_the_lowest_first(tmp_path: Path) -> None:
    with LocalCluster(1) as nodes:
        cut = split(slow(), nodes.cluster(), tmp_path, stages_by(a="*"), max_in_flight=PLACES)
        await asyncio.to_thread(deploy, cut.plan, cut.shards, name="slow")
        async with splitnet.AsyncClient(cut.address, "slow") as client:
            given = [cut.inputs(1000, seed=i) for i in range(PLACES)]
            usual = [asyncio.create_task(client.infer(inputs, priority=int(i != PLACES - 2))) for i, inputs in enumerate(given)]
            while len(nodes.server("a").ledger.calls._live) < PLACES or any(not c.received for c in nodes.server("a").ledger.calls):
                await asyncio.sleep(0.005)
            with pytest.raises(Overloaded, match="is the limit"):
                await client.infer(cut.inputs(1), priority=0)  # nobody is less urgent
            urgent = cut.inputs(3)
            answer = await client.infer(urgent, priority=5)
            assert np.array_equal(answer["output"], cut.whole(urgent)["output"])
            outcomes = await asyncio.gather(*usual, return_exceptions=True)
        shed = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
        assert shed == [PLACES - 2]
        (refused,) = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
        assert "a request of priority 5 took its place" in refused.message
        assert refused.retry_after_s > 0
        for inputs, outcome in zip(given, outcomes, strict=True):
            if isinstance(outcome, dict):
                assert np.array_equal(outcome["output"], cut.whole(inputs)["output"])
        await asyncio.to_thread(at_rest, nodes)

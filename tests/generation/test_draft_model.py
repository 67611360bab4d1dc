"""A small model on the ingress's node guesses what a large one is about to say: it says the same, in fewer passes."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from small_engine import SmallEngine, SmallModel, serve

import splitnet
from nodes.engines.decoder.steps import Sampling, Step
from nodes.generation.generator import Generator
from nodes.testing import LocalCluster
from splitnet.errors import EngineFailure

LARGE = SmallModel(pass_s=0.002)


class AlmostEngine(SmallEngine):
    """Says what the large model says, but for every so many positions."""

    def __init__(self, model: SmallModel, large: SmallModel, wrong_each: int, cache_tokens: int) -> None:
        super().__init__(model, 0, cache_tokens)
        self._large = dataclasses.replace(large, pass_s=0.0).engines()
        self._wrong_each = wrong_each

    def compute(self, steps: Sequence[Step], hidden: np.ndarray | None) -> np.ndarray:
        super().compute(steps, None)  # which keeps the books
        for engine in self._large:
            hidden = engine.compute(steps, hidden)
        assert hidden is not None
        position = steps[0].position + len(steps[0].tokens)
        wrong = len(hidden) and position % self._wrong_each == 0
        return (hidden + 1) % self.model.vocabulary if wrong else hidden


@dataclasses.dataclass(frozen=True)
class Almost(SmallModel):
    stages: int = 1
    wrong_each: int = 7

    def engines(self, cache_tokens: int = 1 << 20) -> list[SmallEngine]:
        return [AlmostEngine(self, LARGE, self.wrong_each, cache_tokens)]


def _generator(cluster: LocalCluster, name: str) -> Generator:
    found = cluster.server("a").ledger.deployments[name].generator
    assert found is not None
    return found


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _settled(cluster: LocalCluster, name: str, small: str, engine: SmallEngine) -> None:
    large, lent = _generator(cluster, name), _generator(cluster, small)
    _until(lambda: not (large.slots.live or large.passes or lent.slots.lent or engine._figures))


def _plain(ids: list[int], count: int, **options: float) -> list[int]:
    temperature = np.float32(options.get("temperature", 0)).item()
    return dataclasses.replace(LARGE, pass_s=0.0).generate(ids, count, Sampling(temperature, seed=int(options.get("seed", 0))))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3}])
async def test_the_answer_is_the_same_in_fewer_passes(cluster: LocalCluster, options: dict[str, float]) -> None:
    small, name = f"small{len(options)}", f"large{len(options)}"
    (engine,) = serve(cluster, Almost(), name=small)
    serve(cluster, LARGE, name=name, draft=small)
    async with splitnet.AsyncClient(cluster.addresses["a"], name) as client:
        ids = list(range(40))
        assert [token async for token in client.generate(ids, 120, **options)] == _plain(ids, 120, **options)
        counts = _generator(cluster, name).counts
        assert counts.drafted_tokens > counts.accepted_tokens > 60
        assert counts.passes < 80
        async with client.generate([5], 300, **options) as stream:  # and goes away
            assert [await anext(stream) for _ in range(9)] == _plain([5], 9, **options)

        async def ask(first: int) -> list[int]:
            return [token async for token in client.generate([first, 1, 2], 30, **options)]

        assert await asyncio.gather(*map(ask, range(6))) == [_plain([first, 1, 2], 30, **options) for first in range(6)]
    await asyncio.to_thread(_settled, cluster, name, small, engine)


def test_guesses_that_are_wrong_become_few(cluster: LocalCluster) -> None:
    (engine,) = serve(cluster, Almost(wrong_each=1), name="wrong")
    serve(cluster, LARGE, name="misled", draft="wrong")
    with splitnet.Client(cluster.addresses["a"], "misled") as client:
        assert list(client.generate([1, 2, 3], 150)) == _plain([1, 2, 3], 150)
    _settled(cluster, "misled", "wrong", engine)
    counts = _generator(cluster, "misled").counts
    assert counts.drafted_tokens < 100


def test_a_small_model_that_fails_or_does_not_fit_is_done_without(cluster: LocalCluster) -> None:
    (failing,) = serve(cluster, Almost(), name="failing")
    failing.trouble = EngineFailure("a bit fell over")
    serve(cluster, SmallModel(stages=1, vocabulary=60), name="other")
    for number, small in enumerate(("failing", "other", "nobody")):
        serve(cluster, LARGE, name=f"alone{number}", draft=small)
        with splitnet.Client(cluster.addresses["a"], f"alone{number}") as client:
            assert list(client.generate([4, 3], 20)) == _plain([4, 3], 20)
    assert not failing._figures

"""`splitnet bench` of a model that generates: time to the first token, time per token, and tokens of all sessions, measured beside what the plan predicted."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from partitioner.benching import served
from splitnet import background
from splitnet.client import AsyncClient
from splitnet.errors import BadPlan
from splitnet.explain import seconds_text, table
from splitnet.generation_plan import Expected, Generation
from splitnet.install import default_name
from splitnet.plan import Plan

__all__ = ["GenerationBench", "bench_generation", "generation_text"]

_FEWEST, _SHARE = 3, 10  # answers one after another: at least; of the requests that were asked for, one in so many

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class GenerationBench:
    """Medians over answers; `tokens_per_s` of `sessions` sessions at once, from the first token of all of them to the last. Prompts and answers are as long as the prediction
    says, the prompts random and different, the answers drawn at temperature 1."""

    expected: Expected
    answers: int
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    sessions: int
    deployed_for_this: bool


def bench_generation(
    plan: Plan, *, deployment: str = "", shards: Mapping[str, Path] | None = None, requests: int = 40, seed: int = 0, timeout_s: float = 600.0,
    on_progress: OnProgress | None = None,
) -> GenerationBench:  # fmt: skip
    """Deploys the plan for as long as this takes, where it is not deployed and there are `shards`. Raises BadPlan for a plan without a prediction, and what a request fails with."""
    generation = plan.generation
    if generation is None or generation.expected is None:
        raise BadPlan("the plan predicts nothing of generating", remedy="make it with `splitnet plan MODEL --generate`")
    name = deployment or default_name(plan.model)
    with served(plan, name, shards) as temporary:
        run = _Run(plan, generation, generation.expected, name, seed, timeout_s, on_progress)
        return dataclasses.replace(background.run(run.measured(max(_FEWEST, requests // _SHARE))), deployed_for_this=temporary)


class _Run:
    def __init__(
        self, plan: Plan, generation: Generation, expected: Expected, name: str, seed: int, timeout_s: float, on_progress: OnProgress | None
    ) -> None:
        self._plan, self._generation, self._expected = plan, generation, expected
        self._name, self._timeout_s, self._on_progress = name, timeout_s, on_progress
        self._random = np.random.default_rng(seed)

    async def measured(self, answers: int) -> GenerationBench:
        expected = self._expected
        async with AsyncClient(self._plan.ingress.address, self._name, timeout_s=self._timeout_s) as client:
            await client.connect()
            await self._answer(client, min(2, expected.answer_tokens))  # with everything cold
            alone = []
            for k in range(answers):
                self._told(k, answers + 1, "one session")
                alone.append(await self._answer(client, expected.answer_tokens))
            self._told(answers, answers + 1, f"{expected.sessions} sessions")
            together = await asyncio.gather(*(self._answer(client, expected.answer_tokens) for _ in range(expected.sessions)))
            self._told(answers + 1, answers + 1, "")
        firsts = [times[1] - times[0] for times in alone]
        steps = [(times[-1] - times[1]) / (len(times) - 2) for times in alone if len(times) > 2]
        # Prompts come first, and answers do not end together: what is counted lies between.
        begin, end = max(times[1] for times in together), min(times[-1] for times in together)
        within = sum(1 for times in together for at in times[1:] if begin <= at <= end)
        spread = itertools.chain.from_iterable(times[1:] for times in together)
        if end > begin and within > expected.sessions:
            rate = (within - expected.sessions / 2) / (end - begin)
        else:
            moments = sorted(spread)
            rate = (len(moments) - 1) / max(moments[-1] - moments[0], 1e-9)
        return GenerationBench(
            expected,
            answers,
            statistics.median(firsts),
            statistics.median(steps or [0.0]),
            rate,
            expected.sessions,
            deployed_for_this=False,
        )

    async def _answer(self, client: AsyncClient, count: int) -> list[float]:
        """When it was asked for, and when each token came."""
        prompt = self._random.integers(0, self._generation.vocabulary, self._expected.prompt_tokens)
        times = [time.perf_counter()]
        # Drawn: greedy text of random prompts goes round in circles, which is guessed ahead, and that is in no prediction.
        seed = int(self._random.integers(1 << 32))
        async for _ in client.generate(prompt, count, temperature=1.0, seed=seed, ignore_eos=True, retry=True):
            times.append(time.perf_counter())
        return times

    def _told(self, done: int, total: int, what: str) -> None:
        if self._on_progress:
            self._on_progress(done, total, what)


def generation_text(plan: Plan, report: GenerationBench) -> str:
    """For people."""
    expected = report.expected

    def row(what: str, predicted: float, measured: float, text: Callable[[float], str]) -> tuple[str, ...]:
        return what, text(predicted), text(measured), f"{measured / max(predicted, 1e-12):.2f}x"

    def rate(figure: float) -> str:
        return f"{figure:.3g}/s"

    rows = [
        ("", "predicted", "measured", "measured/predicted"),
        row(f"first token, prompt of {expected.prompt_tokens} (TTFT)", expected.ttft_s, report.ttft_s, seconds_text),
        row("each token, one session (TPOT)", expected.tpot_s, report.tpot_s, seconds_text),
        row(f"tokens, {report.sessions} sessions at once", expected.tokens_per_s, report.tokens_per_s, rate),
    ]
    lines = [
        f"{plan.model}: {report.answers} answers of {expected.answer_tokens} tokens one after another, then {report.sessions} at once",
        "",
        *table(rows),
    ]
    if report.deployed_for_this:
        lines += ["", "deployed for this, and taken off again"]
    return "\n".join(lines)

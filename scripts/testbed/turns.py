"""Several plans served at the same time and measured in turns: what disturbs the machine for a while disturbs them all."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import splitnet
from partitioner.benching import random_inputs

if TYPE_CHECKING:
    import numpy as np

    from splitnet.plan import Plan
    from testbed.measuring import Subject

__all__ = ["measure_in_turns"]

_WARM_UP = 3
_FEWEST_ROUNDS, _MOST_ROUNDS = 4, 60
_SPAN_S = 0.7  # of one plan's turn when many requests are under way
_MOST_REQUESTS = 60

Inputs = dict[str, "np.ndarray"]


def measure_in_turns(subject: Subject, plans: Sequence[Plan], objective: str, budget_s: float) -> list[float]:
    """Seconds of each plan: of a request with nobody else there ("latency"), or per request with as many as it admits ("throughput").

    Takes about `budget_s` for each plan besides deploying, and removes them again. Medians over the rounds; the next round begins with the next
    plan, so that none always follows the same other one. Raises what deploying and requests raise.
    """
    with contextlib.ExitStack() as stack:
        clients = []
        for k, plan in enumerate(plans):
            served = stack.enter_context(subject.deployed(plan, f"turns-{k}"))
            clients.append(stack.enter_context(splitnet.Client(served.ingress.address, deployment=f"turns-{k}", timeout_s=120)))
        assert plans[0].prediction is not None
        inputs = random_inputs(plans[0], {**plans[0].prediction.symbols, "batch": plans[0].prediction.batch}, 0)
        warm_s = [min(_request_s(client, inputs) for _ in range(_WARM_UP)) for client in clients]
        counts = [1 if objective == "latency" else max(2, min(int(_SPAN_S / seconds), _MOST_REQUESTS)) for seconds in warm_s]
        found: list[list[float]] = [[] for _ in clients]
        end_s = time.perf_counter() + budget_s * len(clients)
        for done in range(_MOST_ROUNDS):
            if done >= _FEWEST_ROUNDS and time.perf_counter() > end_s:
                break
            for turn in range(len(clients)):
                k = (done + turn) % len(clients)
                found[k].append(_request_s(clients[k], inputs) if counts[k] == 1 else _each_s(clients[k], inputs, counts[k]))
        return [statistics.median(seconds) for seconds in found]


def _request_s(client: splitnet.Client, inputs: Inputs) -> float:
    started = time.perf_counter()
    client.infer(inputs)
    return time.perf_counter() - started


def _each_s(client: splitnet.Client, inputs: Inputs, count: int) -> float:
    """Seconds from answer to answer once the pipeline is full."""
    arrivals = []
    filled = min(client.max_in_flight, count)
    for _ in client.stream(itertools.repeat(inputs, filled + count)):
        arrivals.append(time.perf_counter())
    return (arrivals[-1] - arrivals[filled - 1]) / count

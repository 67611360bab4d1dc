"""Which codecs the nodes may change to while they serve, and that the worst of them at once keep to what may be lost."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_accuracy import SOME, best, used
from trained_digits import Trained

from partitioner.calibrating import Task, calibrate
from partitioner.calibration import Calibration
from partitioner.cost import CodecFigures
from partitioner.samples import load_samples
from splitnet.codecs import get_codec
from splitnet.errors import BadPlan
from splitnet.plan import CLIENT, CodecOption, Plan, Transfer


@pytest.fixture(scope="module")
def measured(trained: Trained) -> Calibration:
    return calibrate(Task.make(trained.graph, load_samples(trained.data, trained.graph.structure, most=60, batch=20), "mse"), codecs=SOME)


def crossing(chosen: Plan) -> list[Transfer]:
    node = {stage.name: stage.node for stage in chosen.stages} | {CLIENT: chosen.ingress.name}
    return [t for t in chosen.transfers if node[t.source] != node[t.target]]


def names(transfer: Transfer) -> set[str]:
    return {option.name for option in transfer.codecs}


def combinations(chosen: Plan) -> list[Plan]:
    """Every choice that the nodes may make."""
    each = [[o.name for o in t.codecs] or [t.codec] for t in chosen.transfers]
    return [
        dataclasses.replace(
            chosen, transfers=tuple(dataclasses.replace(t, codec=c, codecs=()) for t, c in zip(chosen.transfers, codecs, strict=True))
        )
        for codecs in itertools.product(*each)
    ]


def test_without_a_calibration_they_round_as_bfloat16_does_at_most(trained: Trained) -> None:
    between = [t for t in crossing(best(trained)) if t.source and t.target]
    assert between
    assert all(names(t) == {"raw", "zstd", "bf16"} for t in between)


def test_lossless_plans_stay_lossless(trained: Trained) -> None:
    chosen = best(trained, lossless=True)
    assert all(names(t) == {"raw", "zstd"} for t in crossing(chosen))
    assert not used(chosen)


def test_what_the_user_wished_on_a_link_stays(trained: Trained) -> None:
    wished = {pair: ["raw", "bf16"] for pair in itertools.permutations("ab", 2)}
    assert all(names(t) <= {"raw", "bf16"} for t in crossing(best(trained, link_codecs=wished)))


def test_what_stays_on_a_node_and_what_is_small_has_no_alternatives(trained: Trained) -> None:
    chosen = best(trained)
    node = {stage.name: stage.node for stage in chosen.stages} | {CLIENT: chosen.ingress.name}
    assert all(not t.codecs for t in chosen.transfers if node[t.source] == node[t.target] or not t.bytes)


def test_answers_to_the_client_go_without_loss(trained: Trained) -> None:
    chosen = best(trained)
    assert all(get_codec(o.name).lossless for t in chosen.transfers if CLIENT in (t.source, t.target) for o in t.codecs)


@settings(max_examples=15)
@given(budget=st.floats(1e-7, 1.0), stages=st.integers(2, 3))
def test_the_worst_of_all_at_once_keeps_to_the_budget(trained: Trained, measured: Calibration, budget: float, stages: int) -> None:
    chosen = best(trained, names="abc", stages=stages, max_accuracy_loss=budget, calibration=measured)
    figures = measured.figures(trained.graph.structure, {name: CodecFigures() for name in SOME})
    producer = trained.graph.structure.producer
    total = math.fsum(
        max((figures[o.name].error_of(producer[v].name) for o in t.codecs for v in t.tensors), default=0.0)
        for t in crossing(chosen)
        if t.source and t.target
    )
    assert total <= budget


def test_what_loses_too_much_as_a_whole_is_not_permitted(trained: Trained, measured: Calibration) -> None:
    """int4 was allotted a share by its own loss; then the whole was measured."""

    def measure(chosen: Plan) -> float:
        return 1.0 if "int4" in used(chosen) else 1e-9

    chosen = best(trained, max_accuracy_loss=0.5, calibration=measured, measure_loss=measure)
    assert used(chosen) == {"int8"}
    assert {"int8", "bf16", "zstd"} <= {name for t in crossing(chosen) for name in names(t)}
    assert all(measure(one) <= 0.5 for one in combinations(chosen))


def test_they_travel_with_the_plan_and_old_plans_are_read(trained: Trained) -> None:
    chosen = best(trained)
    assert Plan.from_json(chosen.to_json()) == chosen
    old = dataclasses.replace(chosen, transfers=tuple(dataclasses.replace(t, codecs=()) for t in chosen.transfers))
    text = old.to_json().replace('   "codecs": [],\n', "")
    assert '"codecs"' not in text
    assert Plan.from_json(text) == old


@pytest.mark.parametrize(
    "options",
    [
        (CodecOption("zstd", 1.0, 1e9, 1e9),),  # the one that is used is missing
        (CodecOption("raw", 1.0, 1e9, 1e9), CodecOption("raw", 1.0, 1e9, 1e9)),
        (CodecOption("raw", 1.0, 1e9, 1e9), CodecOption("zstd", 0.0, 1e9, 1e9)),
        (CodecOption("raw", 1.0, 1e9, 1e9), CodecOption("zstd", 1.0, math.inf, 1e9)),
    ],
)
def test_a_plan_with_figures_that_cannot_be_is_refused(trained: Trained, options: tuple[CodecOption, ...]) -> None:
    chosen = best(trained, lossless=True)
    with pytest.raises(BadPlan, match="codec"):
        dataclasses.replace(chosen, transfers=tuple(dataclasses.replace(t, codec="raw", codecs=options) for t in chosen.transfers))

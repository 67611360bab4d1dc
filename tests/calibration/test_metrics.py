"""Metrics, on figures that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from partitioner.metrics import METRICS, find_metric, judged_output
from partitioner.samples import Batch
from splitnet.errors import BadInput
from splitnet.plan import OutputSpec
from splitnet.tensors import TensorSpec


def lost(name: str, whole: np.ndarray, split: np.ndarray, labels: np.ndarray | None = None, **inputs: np.ndarray) -> float:
    metric = METRICS[name]
    return metric.loss(metric.sums(Batch(inputs, labels), whole, split))


def one_hot(*classes: int) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[list(classes)]


@pytest.mark.parametrize("name", sorted(METRICS))
def test_the_whole_model_loses_nothing(name: str) -> None:
    whole = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    assert lost(name, whole, whole, np.zeros(5, np.int64)) == pytest.approx(0.0, abs=1e-15)


def test_top1_is_against_the_labels_where_there_are_any() -> None:
    whole, split = one_hot(0, 1, 2, 3), one_hot(0, 1, 3, 2)
    assert lost("top1", whole, split) == 0.5  # two answers are no longer the whole model's
    assert lost("top1", whole, split, np.array([0, 1, 2, 0])) == 0.25  # of three right ones, two are left
    assert lost("top1", whole, split, np.array([0, 1, 3, 3])) == 0.0  # one lost, one won
    assert lost("top1", one_hot(1, 1), one_hot(0, 0), np.array([0, 0])) == -1.0
    assert lost("top1", whole, split, np.array([0, 1, -100, -100])) == 0.0
    assert METRICS["top1"].score(METRICS["top1"].sums(Batch({}, np.array([0, 1, 2, 0])), whole, split)) == 0.75


def test_answers_that_are_no_numbers_are_wrong() -> None:
    whole = one_hot(1, 2).astype(np.float32)
    split = whole.copy()
    split[0] = np.nan  # argmax calls this class 0
    assert lost("top1", whole, split) == 0.5
    assert lost("top1", one_hot(0, 0), np.full((2, 4), np.nan, np.float32)) == 1.0
    for name in ("cosine", "mse", "perplexity"):
        assert lost(name, whole, split, np.array([1, 2])) == math.inf


def test_cosine_is_of_the_last_dimension_and_leaves_padding_out() -> None:
    whole = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    split = np.array([[[0.0, 2.0], [3.0, 0.0]]])
    assert lost("cosine", whole, split) == pytest.approx(0.5)
    assert lost("cosine", whole, split, attention_mask=np.array([[0, 1]])) == pytest.approx(0.0)
    assert lost("cosine", np.zeros((1, 2)), np.zeros((1, 2))) == 0.0
    assert lost("cosine", np.zeros((1, 2)), np.ones((1, 2))) == 1.0


def test_mse_is_relative_to_the_output_s_power() -> None:
    assert lost("mse", np.array([3.0, 4.0]), np.array([3.0, 3.0])) == pytest.approx(1 / 25)
    assert lost("mse", np.zeros(2), np.ones(2)) == math.inf


def test_perplexity_is_torch_s() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, split = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    tokens = torch.randint(0, 7, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    def expected(logits: torch.Tensor) -> float:
        targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), targets.reshape(-1)).exp())

    given = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()}
    assert lost("perplexity", whole.numpy(), split.numpy(), **given) == pytest.approx(expected(split) / expected(whole) - 1, rel=1e-5)
    labels = np.full((2, 5), -100)
    labels[:, :-1] = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    assert lost("perplexity", whole.numpy(), split.numpy(), labels) == pytest.approx(expected(split) / expected(whole) - 1, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("top1", np.zeros((2, 2), np.int64), "labels of shape"),
        ("perplexity", None, "needs labels of shape"),
        ("perplexity", np.array([0, 4]), r"labels must be within \[0, 4\)"),
        ("perplexity", np.array([0]), "labels of shape"),
    ],
)
def test_labels_that_do_not_fit_are_refused(name: str, labels: np.ndarray | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        lost(name, one_hot(0, 1), one_hot(0, 1), labels)


def test_which_output_is_judged() -> None:
    def outputs(**shapes: tuple[int | str, ...]) -> tuple[OutputSpec, ...]:
        return tuple(OutputSpec(name, TensorSpec(name, "float32", shape)) for name, shape in shapes.items())

    both = outputs(hidden=("batch", 8), logits=("batch", 4))
    assert judged_output(both, "top1") == "logits"
    assert judged_output(both, "cosine", "hidden") == "hidden"
    assert judged_output(outputs(hidden=("batch", 8), pooled=("batch", 4)), "cosine") == "hidden"
    with pytest.raises(BadInput, match="no output 'nonsense'; it has hidden, logits"):
        judged_output(both, "top1", "nonsense")
    with pytest.raises(BadInput, match="at least 2 dimensions"):
        judged_output(outputs(price=("batch",)), "cosine")
    assert judged_output(outputs(price=("batch",)), "mse") == "price"
    with pytest.raises(BadInput, match="no output is called 'logits'"):
        judged_output(outputs(hidden=("batch", 8)), "perplexity")
    with pytest.raises(BadInput, match="metric 'bleu' is not one of"):
        find_metric("bleu")

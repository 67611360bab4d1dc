"""What a task loses: a split model's answers held against the whole model's, on the same samples. Pure arithmetic.

Every loss is a share, 0 for the whole model itself; one that is negative says that the split model happened to do better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from partitioner.samples import Batch
from splitnet.errors import BadInput
from splitnet.plan import OutputSpec

__all__ = ["METRICS", "Metric", "Sums", "find_metric", "judged_output"]

Sums = np.ndarray  #: float64; those of several batches add up
_MASK = "attention_mask"
_IGNORED = -100  # a label that does not count, as in transformers and torch
_KINDS = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True)
class Metric:
    """`sums(batch, whole, split)` is what one batch adds, of the judged output of the whole model and of the split one. `loss(sums)` is the
    share lost, inf where the split model's answers are no numbers; `score(sums)` what the whole model reaches, `unit` what that is called."""

    name: str
    unit: str
    sums: Callable[[Batch, np.ndarray, np.ndarray], Sums]
    loss: Callable[[Sums], float]
    score: Callable[[Sums], float]
    labelled: bool = False  # whether labels are looked at


def judged_output(outputs: tuple[OutputSpec, ...], metric: str, asked: str = "") -> str:
    """The output that a metric looks at: the one asked for; else "logits" where there is one, else the first. Raises BadInput."""
    names = [output.spec.name for output in outputs]
    if asked and asked not in names:
        raise BadInput(f"the model has no output {asked!r}; it has {', '.join(names)}")
    name = asked or ("logits" if "logits" in names else names[0])
    spec = next(output.spec for output in outputs if output.spec.name == name)
    least = 1 if metric == "mse" else 2
    if len(spec.shape) < least or spec.dtype not in {kind.name for kind in _KINDS}:
        shape = ", ".join(map(str, spec.shape))
        raise BadInput(
            f"{metric} needs an output of floats with at least {least} dimension{'s' if least > 1 else ''}; {name!r} is {spec.dtype} of ({shape})",
            remedy=f"choose another of the outputs {', '.join(names)} with --output, or another metric",
        )
    if metric == "perplexity" and not asked and name != "logits":
        raise BadInput(
            f"perplexity needs the scores of all tokens, and no output is called 'logits'; the model has {', '.join(names)}",
            remedy="name the one that holds them with --output; a model by hf: has no head, so give a py: factory that returns one with it",
        )
    return name


def find_metric(name: str) -> Metric:
    try:
        return METRICS[name]
    except KeyError:
        raise BadInput(f"metric {name!r} is not one of {', '.join(METRICS)}") from None


# ------------------------------------------------------------------------------------------------------------------- top-1


def _top1(batch: Batch, whole: np.ndarray, split: np.ndarray) -> Sums:
    best, found = _wide(whole).argmax(-1), _wide(split).argmax(-1)
    labels = best if batch.labels is None else batch.labels
    if labels.shape != best.shape:
        raise BadInput(
            f"labels of shape {labels.shape} for answers of shape {best.shape}",
            remedy="give one class for each answer, as int64; or leave labels out",
        )
    counted = _counted(batch, best.shape) & (labels != _IGNORED)
    right = found == labels
    if not np.isfinite(_wide(split)).all():
        right = right & np.isfinite(_wide(split)).all(-1)  # an answer that is no number is wrong
    return np.array([counted.sum(), (best == labels)[counted].sum(), right[counted].sum()], np.float64)


# ------------------------------------------------------------------------------------------------------------------ cosine


def _cosine(batch: Batch, whole: np.ndarray, split: np.ndarray) -> Sums:
    a, b = _wide(whole), _wide(split)
    counted = _counted(batch, a.shape[:-1])
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is lost
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        alike = np.where(norms == 0, (a == b).all(-1), (a * b).sum(-1) / np.where(norms == 0, 1.0, norms))
    return np.array([counted.sum(), alike[counted].sum()], np.float64)


# -------------------------------------------------------------------------------------------------------------- perplexity


def _perplexity(batch: Batch, whole: np.ndarray, split: np.ndarray) -> Sums:
    labels = batch.labels
    if labels is None:
        tokens = batch.inputs.get("input_ids")
        if tokens is None or tokens.shape != whole.shape[:-1]:
            raise BadInput(
                f"perplexity of an output of shape {whole.shape} needs labels of shape {whole.shape[:-1]}",
                remedy='add an array "labels" to the data: the right class or token at each place, -100 where none counts',
            )
        labels = np.full(tokens.shape, _IGNORED, np.int64)
        labels[..., :-1] = tokens[..., 1:]  # each place predicts the token that follows
        if (mask := batch.inputs.get(_MASK)) is not None and mask.shape == labels.shape:
            labels[..., :-1][mask[..., 1:] == 0] = _IGNORED
    if labels.shape != whole.shape[:-1]:
        raise BadInput(f"labels of shape {labels.shape} for answers of shape {whole.shape[:-1]}", remedy="give one class for each answer")
    counted = labels != _IGNORED
    if counted.any() and not 0 <= int(labels[counted].min()) <= int(labels[counted].max()) < whole.shape[-1]:
        raise BadInput(f"labels must be within [0, {whole.shape[-1]}), the output's last dimension, got {labels[counted].max()}")
    spent = [-_log_softmax(logits[counted], labels[counted]).sum() for logits in (whole, split)]
    return np.array([counted.sum(), *spent], np.float64)


def _log_softmax(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    wide = _wide(logits)
    with np.errstate(invalid="ignore", over="ignore"):
        wide = wide - wide.max(-1, keepdims=True)
        found: np.ndarray = np.take_along_axis(wide, labels[:, None], -1)[:, 0] - np.log(np.exp(wide).sum(-1))
    return found


# --------------------------------------------------------------------------------------------------------------------- mse


def _mse(batch: Batch, whole: np.ndarray, split: np.ndarray) -> Sums:
    a, b = _wide(whole), _wide(split)
    counted = _counted(batch, a.shape[:-1]) if a.ndim > 1 else np.ones(a.shape, bool)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.array([((a - b)[counted] ** 2).sum(), (a[counted] ** 2).sum()], np.float64)


# -------------------------------------------------------------------------------------------------------------------- both


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _counted(batch: Batch, shape: tuple[int, ...]) -> np.ndarray:
    """Which answers count: all; where they belong to tokens, those that are no padding."""
    mask = batch.inputs.get(_MASK)
    return mask != 0 if mask is not None and mask.shape == shape else np.ones(shape, bool)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("top1", "of the answers right", _top1, lambda s: float(s[1] - s[2]) / max(s[0], 1), lambda s: s[1] / max(s[0], 1), labelled=True),
        Metric("cosine", "cosine", _cosine, lambda s: _finite(1 - s[1] / max(s[0], 1)), lambda s: 1.0),
        Metric(
            "perplexity", "perplexity", _perplexity, lambda s: _finite(math.expm1(min((s[2] - s[1]) / max(s[0], 1), 700.0))),
            lambda s: math.exp(min(s[1] / max(s[0], 1), 700.0)), labelled=True,
        ),
        Metric("mse", "relative error", _mse, lambda s: _finite(s[0] / s[1]) if s[1] > 0 else (0.0 if s[0] == 0 else math.inf), lambda s: 0.0),
    )
}  # fmt: skip

"""The next token from scores. Each draw hangs on (seed, position) alone, so that batching, a repeated step and speculation do not change it."""

from __future__ import annotations

import numpy as np

from nodes.engines.decoder.steps import Sampling

__all__ = ["next_token"]

_WORD = (1 << 64) - 1
_SHORTEST = 1e-300


def next_token(scores: np.ndarray, sampling: Sampling, history: np.ndarray, position: int) -> int:
    """`scores` float32 [vocabulary] (may be written into), `history`: the ids so far, `position`: where the token will stand. In the order of transformers: penalty,
    temperature, top k, top p. The lowest id of several that are equally likely; greedy where `temperature` is 0."""
    if sampling.repetition_penalty != 1.0 and len(history):
        seen = np.unique(history)
        found = scores[seen]
        scores[seen] = np.where(found < 0, found * sampling.repetition_penalty, found / sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(np.argmax(scores))
    wide = scores.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(wide):
        wide[wide < np.partition(wide, -sampling.top_k)[-sampling.top_k]] = -np.inf
    probability = np.exp(wide - wide.max())
    probability /= probability.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probability, kind="stable")
        before = np.cumsum(probability[order]) - probability[order]
        probability[order[before >= sampling.top_p]] = 0  # the likeliest one always stays: nothing is before it
    return int(np.argmax(probability / _waits(sampling.seed, position, len(probability))))


def _waits(seed: int, position: int, count: int) -> np.ndarray:
    """float64 [count], exponential: of tokens that set out at rates that are their probabilities, token i arrives first with its probability. Two models that draw with the same waits
    draw the same token as often as their probabilities allow, up to a factor (Daliri et al. 2025, "Coupling without Communication and Drafter-Invariant Speculative Decoding"): so a small
    model's draw is a guess at a large one's, and none of its probabilities need travel. Philox (Salmon et al. 2011) is a counter-based generator: one position needs no others."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed & _WORD, position & _WORD], np.uint64)))
    return np.maximum(generator.standard_exponential(count), _SHORTEST)

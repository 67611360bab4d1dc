"""The next token from scores: greedy as transformers, and drawn as the probabilities say."""

from __future__ import annotations

from pathlib import Path

import decoder_shards as tiny
import numpy as np
import torch
from decoder_shards import Step, ids, run

from nodes.engines.decoder import Sampling
from nodes.engines.decoder.sampling import next_token

SCORES = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.5], np.float32)
NOTHING = np.array([], np.int32)


def _drawn(sampling: Sampling, count: int = 4000, history: np.ndarray = NOTHING) -> np.ndarray:
    tokens = [next_token(SCORES.copy(), sampling, history, position) for position in range(count)]
    return np.bincount(tokens, minlength=len(SCORES)) / count


def _expected(sampling: Sampling) -> np.ndarray:
    """By transformers' own warpers."""
    from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    return np.asarray(torch.softmax(steps(None, torch.from_numpy(SCORES.copy())[None]), dim=-1)[0].numpy())


def test_the_lowest_of_equal_scores_wins():
    assert next_token(SCORES.copy(), Sampling(), NOTHING, 5) == 1


def test_draws_follow_the_probabilities():
    for sampling in (
        Sampling(1.0, seed=3),
        Sampling(0.7, top_k=3, seed=4),
        Sampling(2.0, top_p=0.8, seed=5),
        Sampling(1.3, top_p=0.6, top_k=4, seed=6),
    ):
        found, expected = _drawn(sampling), _expected(sampling)
        assert np.abs(found - expected).max() < 0.03, (sampling, found, expected)
        assert not found[expected == 0].any()


def test_a_draw_is_the_same_again_and_another_with_another_seed():
    sampling = Sampling(1.0, seed=9)
    first = [next_token(SCORES.copy(), sampling, NOTHING, p) for p in range(50)]
    assert first == [next_token(SCORES.copy(), sampling, NOTHING, p) for p in range(50)]
    assert first != [next_token(SCORES.copy(), Sampling(1.0, seed=10), NOTHING, p) for p in range(50)]
    assert next_token(SCORES.copy(), Sampling(1.0, seed=(1 << 64) - 1), NOTHING, 1 << 40) in range(6)


def test_the_repetition_penalty_is_that_of_transformers(tmp_path: Path):
    model = tiny.build(tiny.CONFIGS["llama"])
    stage = tiny.engines(tiny.cut(model, tiny.save(model, tmp_path / "model"), [], tmp_path))
    prompt = [5, 6, 7, 8]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, repetition_penalty=1.8)[0][
        4:
    ].tolist()
    assert expected != tiny.generated(model, prompt, 12)
    tokens = run(stage, [Step(1, 0, ids(*prompt), 1, Sampling(repetition_penalty=1.8))]).tolist()
    while len(tokens) < 12:
        tokens += run(stage, [Step(1, 3 + len(tokens), ids(tokens[-1]), 1)]).tolist()
    assert tokens == expected

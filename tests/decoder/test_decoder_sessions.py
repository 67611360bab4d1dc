"""Caches of several sessions in one engine: batches, positions that come again, forks, slots, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import decoder_shards as tiny
import numpy as np
import pytest
import torch
from decoder_shards import Step, greedy, ids, run

from nodes.engines import load_engine
from nodes.engines.decoder import Sampling, StepEngine
from nodes.engines.decoder.engine import DecoderEngine
from splitnet.errors import BadInput, Overloaded
from splitnet.shard import Shard

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]


@pytest.fixture(scope="module", params=["mistral", "gemma2", "qwen3_moe"])  # lean, transformers' modules, experts
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    model = tiny.build(tiny.CONFIGS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    return tiny.cut(model, tiny.save(model, folder / "model"), [2], folder)


@pytest.fixture(scope="module")
def loaded(shards: list[Shard]) -> list[DecoderEngine]:
    return tiny.engines(shards)


@pytest.fixture
def stages(loaded: list[DecoderEngine]) -> list[DecoderEngine]:
    """Without sessions."""
    for stage in loaded:
        for session in range(20):
            stage.close(session)
        assert stage.free_tokens() == 512
    return loaded


def test_batched_sessions_get_the_tokens_that_they_get_alone(stages: list[DecoderEngine]):
    random = np.random.default_rng(1)
    prompts = [random.integers(0, tiny.VOCABULARY, length).tolist() for length in (3, 17, 9, 1)]
    alone = [greedy(stages, prompt, 8, session=10 + i) for i, prompt in enumerate(prompts)]
    # the first pass: a whole prompt, a piece of one, and each session goes its own pace afterwards
    tokens: list[list[int]] = [[] for _ in prompts]
    given = [0] * len(prompts)
    for turn in range(40):
        steps = []
        for i, prompt in enumerate(prompts):
            known = prompt + tokens[i]
            if len(tokens[i]) < 8 and (turn + i) % 3:
                piece = known[given[i] : given[i] + 5]
                steps.append(Step(i, given[i], ids(*piece), int(given[i] + len(piece) == len(known))))
        if not steps:
            continue
        found = iter(run(stages, steps))
        for step in steps:
            given[step.session] += len(step.tokens)
            tokens[step.session] += [int(next(found)) for _ in range(step.wanted)]
        assert next(found, None) is None
    assert tokens == alone


def test_drafts_are_verified_in_one_pass_and_a_step_may_come_again(stages: list[DecoderEngine]):
    expected = greedy(stages, PROMPT, 8)
    drafts = [*expected[:3], (expected[3] + 1) % tiny.VOCABULARY, 7]
    run(stages, [Step(2, 0, ids(*PROMPT))])
    step = Step(2, len(PROMPT), ids(*drafts), len(drafts))
    first, again = run(stages, [step]), run(stages, [step])
    assert first[:3].tolist() == expected[1:4]
    np.testing.assert_array_equal(first, again)
    # back to where the drafts were right
    assert run(stages, [Step(2, len(PROMPT) + 3, ids(expected[3]), 1)]).tolist() == [expected[4]]
    assert stages[0].free_tokens() == 512 - (len(PROMPT) + 4) - (len(PROMPT) + 7)


def test_a_fork_starts_with_the_others_prefix(stages: list[DecoderEngine]):
    expected = greedy(stages, PROMPT, 5)
    for stage in stages:
        stage.fork(1, 4, 6)
        stage.close(1)
    continued = [int(run(stages, [Step(4, 6, ids(*PROMPT[6:]), 1)])[0])]
    while len(continued) < 5:
        continued.append(int(run(stages, [Step(4, len(PROMPT) + len(continued) - 1, ids(continued[-1]), 1)])[0]))
    assert continued == expected


def test_a_shorter_second_prompt_gives_slots_back(stages: list[DecoderEngine]):
    long = list(range(90))
    greedy(stages, long, 1)
    assert stages[0].free_tokens() == 512 - 90
    assert greedy(stages, PROMPT, 4) == greedy(stages, PROMPT, 4, session=9)
    stages[0].close(1)
    stages[0].close(9)
    stages[0].close(1234)  # unknown is fine
    assert stages[0].free_tokens() == 512


def test_slots_run_out_and_nothing_has_changed(shards: list[Shard]):
    stage = DecoderEngine.load(shards[0], threads=1, cache_tokens=20)
    assert stage.cache_bytes() == 20 * stage.spec.kv_bytes_per_token
    stage.step([Step(1, 0, ids(*range(12)))], None)
    before = stage.step([Step(1, 12, ids(5))], None)
    with pytest.raises(Overloaded, match="has 7 of 20 slots left, 9 more are needed") as raised:
        stage.step([Step(1, 13, ids(1)), Step(2, 0, ids(*range(8)))], None)
    assert raised.value.retry_after_s > 0
    with pytest.raises(Overloaded):
        stage.fork(1, 3, 10)
    assert stage.free_tokens() == 7
    np.testing.assert_array_equal(stage.step([Step(1, 12, ids(5))], None), before)
    stage.step([Step(2, 0, ids(*range(7)))], None)
    assert stage.free_tokens() == 0


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "at least one step"),
        ([Step(1, 0, ids())], "at least one token id"),
        ([Step(1, 0, ids(1), 2)], "wanted at 2 of 1 positions"),
        ([Step(1, 0, ids(96))], "token id 96 is out of range: the vocabulary has 96"),
        ([Step(1, 0, ids(4, -1))], "token id -1 is out of range"),
        ([Step(1, 3, ids(1))], "position 3 is beyond what is in the cache: 0 tokens"),
        ([Step(1, -1, ids(1))], "position -1 is beyond"),
        ([Step(1, 0, ids(*[1] * 129))], "129 tokens are more than the model's context holds: 128"),
        ([Step(1, 0, ids(1)), Step(1, 1, ids(2))], "two steps of one session"),
    ],
)
def test_bad_steps_are_refused(stages: list[DecoderEngine], steps: Sequence[Step], said: str):
    with pytest.raises(BadInput, match=said):
        stages[0].step(steps, None)
    assert stages[0].free_tokens() == 512


def test_hidden_states_must_fit(stages: list[DecoderEngine]):
    step = Step(1, 0, ids(1, 2))
    with pytest.raises(BadInput, match="the first stage embeds"):
        stages[0].step([step], np.zeros((2, 32), np.float32))
    for wrong in (None, np.zeros((3, 32), np.float32), np.zeros((2, 32), np.float64)):
        with pytest.raises(BadInput, match=r"hidden_states: expected float32 \(2, 32\)"):
            stages[1].step([step], wrong)
    with pytest.raises(BadInput, match="session 8 is not known, 3 were asked for"):
        stages[0].fork(8, 9, 3)


def test_the_registry_knows_the_engine(shards: list[Shard]):
    loaded = load_engine(shards[0], threads=1, cache_tokens=64)
    assert isinstance(loaded, StepEngine)
    assert loaded.free_tokens() == 64
    assert 0 < loaded.memory_bytes() <= shards[0].manifest.param_bytes
    with pytest.raises(BadInput, match="cache_tokens: expected at least 1, got 0"):
        load_engine(shards[0], threads=1)


def test_a_draw_hangs_on_seed_and_position_alone(stages: list[DecoderEngine]):
    def drawn(session: int, seed: int, chunk: int) -> list[int]:
        sampling = Sampling(temperature=1.5, top_p=0.95, top_k=40, seed=seed)
        run(stages, [Step(session, 0, ids(*PROMPT[:chunk]), sampling=sampling)])
        tokens = [int(run(stages, [Step(session, chunk, ids(*PROMPT[chunk:]), 1)])[0])]
        while len(tokens) < 10:
            tokens.append(int(run(stages, [Step(session, len(PROMPT) + len(tokens) - 1, ids(tokens[-1]), 1)])[0]))
        return tokens

    assert drawn(1, 7, 3) == drawn(2, 7, 8)
    assert drawn(3, 8, 3) != drawn(2, 7, 8)


def test_inference_leaves_torch_as_it_was(stages: list[DecoderEngine]):
    greedy(stages, PROMPT, 2)
    assert torch._C._get_mkldnn_enabled()
    assert torch.is_grad_enabled()

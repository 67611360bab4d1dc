"""Plans of decoder models: what is chosen, what is predicted, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from tiny_decoders import WORKLOAD, cluster_of

from partitioner.decoders.figures import DecoderProfile, Workload
from partitioner.decoders.model import DecoderModel
from partitioner.decoders.planning import OBJECTIVES, plan_decoder
from partitioner.decoders.weights import Weights
from splitnet.cluster import CodecSpeed
from splitnet.errors import BadInput, BadPlan, NoPlan
from splitnet.plan import Plan

MakeProfile = Callable[..., DecoderProfile]
ROOM = 1 << 30
PLAIN = {"float32/float32": 1.0}
EVERY = {"float32/float32": 1.0, "float32/int8": 0.5, "bfloat16/bfloat16": 2.0, "bfloat16/int4": 2.0}


def needed(model: DecoderModel, form: str = "float32", dtype: str = "float32") -> int:
    """By the whole model with its caches, on one node."""
    count, passing = len(model.vertices), WORKLOAD.context_length  # shorter than the longest chunk
    cache = model.kv_bytes(0, count, dtype) * WORKLOAD.context_length * WORKLOAD.sessions
    working = model.working_bytes(0, count, chunk=passing, batch=WORKLOAD.sessions, dtype=dtype)
    return model.param_bytes(0, count, form, dtype) + cache + working + 2 * 8 * passing


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_plan_is_the_best_of_all_cuts_by_hand(llama: DecoderModel, profile_of: MakeProfile, objective: str) -> None:
    profile = profile_of(llama, {"a": 1.0, "b": 0.7, "c": 2.0}, PLAIN)
    cluster = cluster_of({"a": needed(llama) * 2 // 3, "b": needed(llama) * 6 // 10, "c": ROOM}, latency_s=1e-4)
    chosen = plan_decoder(llama, profile, cluster, WORKLOAD, objective=objective, margin=0.0)
    reached = []
    for count in (1, 2, 3):
        for order in itertools.permutations("abc", count):
            for at in itertools.combinations(llama.vertices[1:], count - 1):
                try:
                    plan = plan_decoder(llama, profile, cluster, WORKLOAD, objective=objective, at=at, nodes=order, margin=0.0)
                except NoPlan:
                    continue
                assert plan.prediction is not None
                reached.append(plan.prediction)
    assert len(reached) > 20
    assert chosen.prediction is not None
    if objective == "throughput":
        assert chosen.prediction.throughput_per_s == pytest.approx(max(p.throughput_per_s for p in reached))
    else:
        assert chosen.prediction.latency_s == pytest.approx(min(p.latency_s for p in reached))
    assert chosen.prediction.bound <= 1.000001 * (
        1 / chosen.prediction.throughput_per_s if objective == "throughput" else chosen.prediction.latency_s
    )


def test_what_is_predicted_adds_up(llama: DecoderModel, profile_of: MakeProfile) -> None:
    profile = profile_of(llama, {"a": 1.0, "b": 1.0}, PLAIN)
    cluster = cluster_of({"a": ROOM, "b": ROOM}, bytes_per_s=1e6, latency_s=0.01)
    plan = plan_decoder(llama, profile, cluster, WORKLOAD, objective="tpot", at=["layers.2"], nodes=["a", "b"])
    generation = plan.generation
    assert generation is not None
    expected = generation.expected
    assert expected is not None
    hidden = 64 * 4
    step_s = 5 * 1e-3
    assert expected.tpot_s == pytest.approx(step_s + 2 * 0.01 + (hidden + 4) / 1e6)
    assert expected.chunk_tokens == 32  # the whole prompt: a shorter chunk is not worth a pass
    chunk_s = step_s + 4 * step_s * 31 / 15 + 2 * 0.01 + (32 * hidden + 4) / 1e6  # measured were 1 and 16 tokens
    assert expected.ttft_s == pytest.approx(chunk_s)
    # all four in one pass, or two passes of two: what keeps more of the way busy
    assert expected.tokens_per_s > 4 / (step_s * 1.3 + 0.02 + 0.001) * 0.99
    assert generation.kv_bytes_per_token == {"stage0": llama.kv_bytes(0, 3, "float32"), "stage1": llama.kv_bytes(3, 6, "float32")}
    assert Plan.from_json(plan.to_json()) == plan
    text = plan.explain()
    for word in ("TTFT", "TPOT", "KV cache", "tokens/s", "a->b", "256 B"):
        assert word in text


def test_chunks_of_a_long_prompt_follow_each_other(llama: DecoderModel, profile_of: MakeProfile) -> None:
    profile = profile_of(llama, {"a": 1.0, "b": 1.0}, PLAIN)
    cluster = cluster_of({"a": ROOM, "b": ROOM}, bytes_per_s=1e9, latency_s=0.001)
    long = Workload(128, 1, 96, 8, 16)
    plan = plan_decoder(llama, profile, cluster, long, objective="ttft", at=["layers.2"], nodes=["a", "b"])
    assert plan.generation is not None
    expected = plan.generation.expected
    assert expected is not None
    assert expected.chunk_tokens == 32
    each_s = 2.5e-3 * (1 + 4 * 31 / 15)  # of a stage, with a chunk of 32
    assert expected.ttft_s == pytest.approx((2 + 2) * each_s + 2 * 0.001, rel=1e-3)  # three chunks through two stages


def test_memory_holds_weights_and_caches(llama: DecoderModel, profile_of: MakeProfile) -> None:
    profile = profile_of(llama, {"a": 1.0, "b": 1.0}, PLAIN)
    cluster = cluster_of({"a": needed(llama), "b": needed(llama)})
    assert len(plan_decoder(llama, profile, cluster, WORKLOAD).stages) == 1
    larger = Workload(64, 8, 32, 8, 16)
    plan = plan_decoder(llama, profile, cluster, larger)
    assert len(plan.stages) == 2
    assert plan.prediction is not None
    for stage in plan.stages:
        assert plan.generation is not None
        least = stage.param_bytes + plan.generation.kv_bytes_per_token[stage.name] * 64 * 8
        assert least < plan.prediction.memory_bytes[stage.node] <= needed(llama)


def test_what_is_missing_is_said(llama: DecoderModel, profile_of: MakeProfile) -> None:
    profile = profile_of(llama, {"a": 1.0, "b": 1.0}, PLAIN)
    with pytest.raises(
        NoPlan,
        match=r"KiB of memory are missing; .* node '[ab]' would need .* for '.*' to '.*' with weights in float32 .*4 sessions of 64 tokens",
    ):
        plan_decoder(llama, profile, cluster_of({"a": 200_000, "b": 100_000}), WORKLOAD)
    lonely = cluster_of({"a": needed(llama) * 2 // 3, "b": needed(llama)})
    with pytest.raises(NoPlan, match="not connected"):
        plan_decoder(llama, profile, type(lonely)(lonely.nodes, ()), WORKLOAD, stages=2)


def test_weights_are_coarser_where_nothing_finer_fits(llama: DecoderModel, profile_of: MakeProfile) -> None:
    profile = profile_of(llama, {"a": 1.0, "b": 1.0}, EVERY)
    fine = plan_decoder(llama, profile, cluster_of({"a": ROOM, "b": ROOM}), WORKLOAD)
    assert fine.generation is not None
    assert set(fine.generation.weights.values()) == {"float32"}  # int8 would be twice as fast, and nobody has said what it loses
    tight = plan_decoder(llama, profile, cluster_of({"a": needed(llama, "bfloat16", "bfloat16") - 1, "b": 90_000}), WORKLOAD)
    assert tight.generation is not None
    assert {"int8", "int4"} & set(tight.generation.weights.values())
    assert tight.prediction is not None
    assert "--data" in tight.prediction.note
    known = Weights("auto", {"": 10.0, "bfloat16": 10.0, "int8": 10.05, "int4": 11.0}, "a text")
    told = plan_decoder(llama, profile, cluster_of({"a": needed(llama, "bfloat16", "bfloat16") - 1, "b": 90_000}), WORKLOAD, weights=known)
    assert told.prediction is not None
    assert "where nothing finer fits" in told.prediction.note
    assert "--data" not in told.prediction.note
    quick = plan_decoder(
        llama, profile, cluster_of({"a": ROOM, "b": ROOM}), WORKLOAD, weights=Weights("auto", {"": 10.0, "bfloat16": 10.0, "int8": 10.05, "int4": 11.0}, "a text", 0.01)
    )  # fmt: skip
    assert quick.generation is not None
    assert set(quick.generation.weights.values()) == {"int8"}
    assert "perplexity 10 as stored; with weights in int8 10.05 (+0.50%); a text" in quick.explain()


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_the_format_may_be_asked_for(llama: DecoderModel, profile_of: MakeProfile, form: str) -> None:
    plan = plan_decoder(llama, profile_of(llama, {"a": 1.0}, EVERY), cluster_of({"a": ROOM}), WORKLOAD, weights=Weights(form))
    assert plan.generation is not None
    assert plan.generation.weights == {"stage0": form}
    assert plan.generation.dtype == ("bfloat16" if form in ("bfloat16", "int4") else "float32")


def test_of_many_nodes_the_quickest_and_the_largest_are_looked_at(llama: DecoderModel, profile_of: MakeProfile) -> None:
    names = [f"n{i}" for i in range(10)]
    profile = profile_of(llama, {name: 1.0 + i for i, name in enumerate(names)}, PLAIN)
    room = dict.fromkeys(names, 1000) | {"n9": ROOM}  # the slowest alone has the room
    plan = plan_decoder(llama, profile, cluster_of(room), WORKLOAD)
    assert [stage.node for stage in plan.stages] == ["n9"]
    assert plan.prediction is not None
    assert "planned over 8 of 10 nodes" in plan.prediction.note
    assert "no bound is known" in plan.explain()


@pytest.mark.parametrize(("dtype", "codec", "sent"), [("float32", "bf16", 128), ("bfloat16", "raw", 128)])
def test_codecs_do_to_hidden_states_what_their_type_allows(
    llama: DecoderModel, profile_of: MakeProfile, dtype: str, codec: str, sent: int
) -> None:
    profile = profile_of(llama, {"a": 1.0, "b": 1.0}, {f"{dtype}/{dtype}": 1.0})
    cluster = cluster_of({"a": ROOM, "b": ROOM}, bytes_per_s=1e4)
    fast = tuple(CodecSpeed(name, 1e9, 1e9, ratio) for name, ratio in (("bf16", 2.0), ("int8", 3.9)))
    cluster = replace(cluster, nodes=tuple(replace(node, codecs=fast) for node in cluster.nodes))
    plan = plan_decoder(llama, profile, cluster, WORKLOAD, stages=2, weights=Weights(dtype))
    assert plan.prediction is not None
    assert (plan.transfers[1].codec, plan.prediction.bytes_per_link["a->b"]) == (codec, sent)
    asked = plan_decoder(
        llama, profile, cluster, WORKLOAD, stages=2, input_at="a", weights=Weights(dtype), link_codecs={("a", "b"): ["int8"]}
    )
    assert asked.prediction is not None
    assert asked.transfers[1].codec == "int8"
    assert asked.prediction.bytes_per_link["a->b"] == 66  # of 64 numbers


def test_wishes_are_kept(llama: DecoderModel, profile_of: MakeProfile) -> None:
    profile = profile_of(llama, {"a": 1.0, "b": 1.0, "c": 1.0}, PLAIN)
    cluster = cluster_of(dict.fromkeys("abc", ROOM))
    plan = plan_decoder(llama, profile, cluster, WORKLOAD, stages=3, pin={"layers.1": "c"}, input_at="b", output_at="a")
    assert [stage.node for stage in plan.stages] == ["b", "c", "a"]
    assert "layers.1" in plan.stages[1].operators
    assert plan.prediction is not None
    assert not plan.prediction.alternatives  # each would have the room: it was not asked for
    assert "fits on no single node" not in plan.explain()
    plan = plan_decoder(llama, profile, cluster, WORKLOAD, forbid=("a", "b"))
    assert [stage.node for stage in plan.stages] == ["c"]
    with pytest.raises(NoPlan, match="cannot all hold|contradicts itself"):
        plan_decoder(llama, profile, cluster, WORKLOAD, max_stages=1, pin={"layers.1": "c", "layers.2": "a"})


def test_what_does_not_belong_together_is_refused(llama: DecoderModel, tied: DecoderModel, profile_of: MakeProfile) -> None:
    profile, cluster = profile_of(llama, {"a": 1.0}, PLAIN), cluster_of({"a": ROOM})
    with pytest.raises(BadPlan, match="profile is of another model"):
        plan_decoder(tied, profile, cluster, WORKLOAD)
    with pytest.raises(BadInput, match="'speed' is none of ttft, tpot, throughput, latency"):
        plan_decoder(llama, profile, cluster, WORKLOAD, objective="speed")
    with pytest.raises(BadInput, match="a context of 4096 tokens: .* was made for 128"):
        plan_decoder(llama, profile, cluster, Workload(4096, 1, 32, 8, 16))
    with pytest.raises(NoPlan, match="no figures of weights in int4"):
        plan_decoder(llama, profile, cluster, WORKLOAD, weights=Weights("int4"))
    assert DecoderProfile.from_json(profile.to_json()) == profile

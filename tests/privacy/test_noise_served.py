"""Noise in plans and shards, and on two real nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import partitioner
import splitnet
from nodes.noising import Released, StageNoise
from nodes.testing import LocalCluster
from partitioner.wishes import wishes
from splitnet.batching import Batching
from splitnet.cli import run_command
from splitnet.commands.install import status
from splitnet.commands.run import run
from splitnet.errors import BadInput, BadPlan, BadShard, NodeUnavailable, NoPlan
from splitnet.noise import Noise, noised_values
from splitnet.plan import Plan, Transfer
from splitnet.rollout import update

NOISE = Noise(8.0, 1e-5, 1.0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A served plan with noise, and all that made it. The second stage adds nothing: what it answers is what has left the first."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 2000), torch.nn.ReLU(), torch.nn.Softsign()).eval()
    graph = partitioner.capture(net, (torch.zeros(2, 8),))
    profile = partitioner.profile(graph, repeats=1)
    folder = tmp_path_factory.mktemp("noise")
    with LocalCluster(2) as cluster:
        wished = {"at": ["2"], "nodes": ["a", "b"], "private": ("a", 1), "lossless": True}
        plan = partitioner.plan(profile, cluster.cluster(), noise=NOISE, **wished)
        bare = partitioner.plan(profile, cluster.cluster(), **wished)
        shards = partitioner.cut(graph, plan, folder / "plan.shards")
        bare_shards = partitioner.cut(graph, bare, folder / "bare.shards")
        plan = plan.with_shards({name: shard.sha256 for name, shard in shards.items()})
        bare = bare.with_shards({name: shard.sha256 for name, shard in bare_shards.items()})
        plan.save(folder / "plan.json")
        deployed = splitnet.deploy(plan, shards, name="noisy")
        yield SimpleNamespace(
            net=net, plan=plan, bare=bare, shards=shards, bare_shards=bare_shards, cluster=cluster, ingress=deployed.ingress, folder=folder,
            profile=profile,
        )  # fmt: skip


def crossed(client: splitnet.Client, x: np.ndarray) -> np.ndarray:
    """What the second node was sent, from its answer."""
    (answer,) = client.infer(x).values()
    wide = answer.astype(np.float64)
    return wide / (1 - np.abs(wide))


def test_what_the_second_node_gets_has_the_noise(two: SimpleNamespace) -> None:
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    whole = torch.relu(two.net[0](torch.from_numpy(x))).detach().numpy().astype(np.float64)
    clipped = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    with splitnet.Client(two.ingress, "noisy") as client:
        first, second = crossed(client, x), crossed(client, x)
        assert client.describe().noise == NOISE
    for seen in (first, second):
        assert (seen - clipped).std(axis=1) == pytest.approx([NOISE.sigma] * 3, rel=0.1)
    assert (first - second).std() == pytest.approx(NOISE.sigma * 2**0.5, rel=0.05)  # drawn anew for each request


def test_status_and_run_say_the_promise(two: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.zeros((5, 8), np.float32)
    np.save(two.folder / "x.npy", x)
    before = next(d for d in splitnet.status(two.plan)[0].deployments if d.name == "noisy")
    assert before.noise == NOISE
    assert run_command(run, prog_name="splitnet run", args=[str(two.folder / "plan.json"), str(two.folder / "x.npy")]) == 0
    assert "what other nodes saw of it is (8, 1e-05)-differentially private per sample" in capsys.readouterr().out
    after = next(d for d in splitnet.status(two.plan)[0].deployments if d.name == "noisy")
    assert after.released == before.released + 5
    assert run_command(status, prog_name="splitnet status", args=["--cluster", str(two.folder / "plan.json")]) == 0
    assert f"{after.released} samples have left a with it" in capsys.readouterr().out


def test_explain_says_what_requests_add_up_to(two: SimpleNamespace) -> None:
    text = two.plan.explain()
    assert "privacy of what leaves a for other nodes: (8, 1e-05)-differentially private per sample" in text
    assert f"epsilon {NOISE.epsilon_after(10):.3g} for 10" in text
    assert "noise is added" in text


def test_a_plan_with_noise_is_read_as_it_was_written(two: SimpleNamespace) -> None:
    assert Plan.from_json(two.plan.to_json()) == two.plan
    assert "noise" not in two.bare.to_json()
    with pytest.raises(BadPlan, match=r"epsilon"):
        Plan.from_json(two.plan.to_json().replace('"epsilon": 8.0', '"epsilon": 0'))


def test_no_plan_turns_the_noise_off(two: SimpleNamespace) -> None:
    """Another node may activate a plan, to replace a lost one; it cannot serve the signed shard without its noise, or with less."""
    for noise in (None, dataclasses.replace(NOISE, epsilon=9.0), dataclasses.replace(NOISE, clip_norm=0.1)):
        with pytest.raises(BadShard, match="was cut to be served with noise"):
            splitnet.deploy(dataclasses.replace(two.plan, noise=noise), two.shards, name="other")
    with pytest.raises(BadShard, match="was cut to be served without noise"):
        splitnet.deploy(dataclasses.replace(two.bare, noise=NOISE), two.bare_shards, name="other")


def test_an_update_does_not_drop_the_noise_unasked(two: SimpleNamespace) -> None:
    with pytest.raises(BadPlan, match="by the new plan it would be without noise"):
        update(two.bare, two.bare_shards, name="noisy")


def test_plans_that_would_let_something_pass_are_refused(two: SimpleNamespace) -> None:
    plan: Plan = two.plan
    first, second = plan.stages
    value = first.outputs[0]
    whole = dataclasses.replace(NOISE, per="request")
    with pytest.raises(BadPlan, match="is int64: it would pass without noise"):
        mask = dataclasses.replace(value, dtype="int64")
        dataclasses.replace(plan, stages=(dataclasses.replace(first, outputs=(mask,)), second))
    with pytest.raises(BadPlan, match="has a replica on 'b'"):
        dataclasses.replace(plan, stages=(dataclasses.replace(first, replicas=("b",)), second))
    with pytest.raises(BadPlan, match="goes to stage 'stage1' as it is"):
        name = plan.inputs[0].name
        further = dataclasses.replace(second, inputs=(*second.inputs, plan.inputs[0]))
        dataclasses.replace(plan, stages=(first, further), transfers=(*plan.transfers, Transfer("", "stage1", (name,))))
    with pytest.raises(BadPlan, match="noise per request: requests cannot be joined"):
        dataclasses.replace(plan, noise=whole, batching=Batching(max_batch=4))
    with pytest.raises(BadPlan, match="noise per sample"):
        fixed = dataclasses.replace(value, shape=(2000,))
        dataclasses.replace(plan, stages=(dataclasses.replace(first, outputs=(fixed,)), second))
    assert noised_values(dataclasses.replace(plan, noise=whole)) == {value.name: None}
    assert noised_values(plan) == {value.name: 0}


def test_wishes_that_contradict_noise_are_refused(two: SimpleNamespace) -> None:
    cluster = two.cluster.cluster()
    with pytest.raises(BadInput, match="noise needs `private`"):
        partitioner.plan(two.profile, cluster, noise=NOISE)
    with pytest.raises(BadInput, match="expected a Noise"):
        partitioner.plan(two.profile, cluster, noise=8.0, private=("a", 1))  # type: ignore[arg-type]
    alone = partitioner.plan(two.profile, cluster, noise=NOISE, private=("a", 1), stages=1)
    assert alone.noise is None
    assert alone.prediction is not None
    assert "no noise was added: nothing leaves the node" in alone.prediction.note


def test_masks_do_not_leave_with_noise() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = mask == 0
            return self.two(self.one(x)).masked_fill(hidden, 0.0)

    graph = partitioner.capture(Masked().eval(), (torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.int64)))
    profile = partitioner.profile(graph, repeats=1)
    with LocalCluster(2) as cluster:
        wished = {"at": ["two"], "nodes": ["a", "b"], "private": ("a", 1)}
        partitioner.plan(profile, cluster.cluster(), **wished)  # a boolean may leave
        with pytest.raises(NoPlan, match="would leave node 'a' without noise: it is bool"):
            partitioner.plan(profile, cluster.cluster(), noise=NOISE, **wished)


def test_options_become_noise() -> None:
    none = dict.fromkeys(("stages", "max_stages", "input_at", "output_at", "max_accuracy_loss", "lossless", "tolerance", "margin"))
    none |= dict.fromkeys(("at", "nodes", "pin", "forbid", "taken", "link_codecs"), ())
    given = {**none, "private": "a=1", "codec_figures": None, "noise_epsilon": 8.0, "noise_clip": 2.0}
    assert wishes(given)["noise"] == Noise(8.0, 1e-6, 2.0)
    with pytest.raises(BadInput, match="--noise-epsilon needs --noise-clip"):
        wishes({**given, "noise_clip": None})
    with pytest.raises(BadInput, match="every token would be another release"):
        wishes({**given, "generate": True})
    with pytest.raises(BadInput, match="add --noise-epsilon"):
        wishes({**given, "noise_epsilon": None})


@pytest.mark.parametrize("axis", [0, 1])
def test_what_left_once_leaves_again_as_it_was(axis: int) -> None:
    """A request is lost with a node and sent again: its rows in other company, or in pieces, have the noise that they had."""
    noise = StageNoise(NOISE, {"x": axis}, "s")
    rng = np.random.default_rng(0)
    call = Released()

    def drawn(rows: int) -> dict[str, np.ndarray]:
        return {"x": np.moveaxis(rng.standard_normal((rows, 3)), 0, axis)}

    def rows(values: dict[str, np.ndarray], first: int, count: int) -> np.ndarray:
        return np.moveaxis(values["x"], axis, 0)[first : first + count].copy()

    piece = drawn(2)
    assert call.replace(piece, noise, 0, 0, 2, 5) == 5 * 3 * 8
    left = rows(piece, 0, 2)
    joined = drawn(9)  # rows 0 to 4 of this call stand at 3 to 7, between others'
    others = rows(joined, 0, 3), rows(joined, 8, 1)
    assert call.replace(joined, noise, 3, 0, 5, 5) == 0
    assert np.array_equal(rows(joined, 3, 2), left)
    assert np.array_equal(rows(joined, 0, 3), others[0])
    assert np.array_equal(rows(joined, 8, 1), others[1])
    again = drawn(5)
    call.replace(again, noise, 0, 0, 5, 5)
    assert np.array_equal(rows(again, 0, 5), rows(joined, 3, 5))
    assert noise.released == 5
    with pytest.raises(NodeUnavailable, match="may not leave another way"):
        call.replace(drawn(5), StageNoise(NOISE, {"x": axis}, "another cut"), 0, 0, 5, 5)


def test_a_whole_request_left_once_leaves_again_as_it_was() -> None:
    noise, call = StageNoise(dataclasses.replace(NOISE, per="request"), {"x": None}, "s"), Released()
    first = {"x": np.ones((2, 3)), "other": np.zeros(1)}
    assert call.replace(first, noise, 0, 0, None, 1) == 48
    again = {"x": np.zeros((2, 3)), "other": np.ones(1)}
    assert call.replace(again, noise, 0, 0, None, 1) == 0
    assert (again["x"] == 1).all()
    assert (again["other"] == 1).all()
    assert noise.released == 1

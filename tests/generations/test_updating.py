"""Updates, canaries and the way back on real nodes, while clients are being answered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain_versions import PLACES, version
from click.testing import CliRunner
from small_models import Split, at_rest, split

import splitnet
from nodes.testing import LocalCluster
from splitnet.channel import open_channel, stub, translated
from splitnet.commands.deploying import deploy as deploy_command
from splitnet.commands.deploying import rollback
from splitnet.commands.install import status as status_command
from splitnet.errors import AlreadyExists, BadInput, BadPlan, InsufficientMemory, Moved, NotFound
from splitnet.install import deploy, undeploy
from splitnet.node_status import DeploymentStatus
from splitnet.rollout import go_back, update
from splitnet.rpc.v1 import node_pb2 as pb

Make = Callable[[int, str], Split]


def generations(cluster: LocalCluster, name: str, node: str) -> dict[int, DeploymentStatus]:
    (status,) = [s for s in splitnet.status(cluster.cluster()) if s.name == node]
    return {d.generation: d for d in status.generations(name)}


def states(cluster: LocalCluster, name: str, node: str) -> dict[int, str]:
    return {number: d.state for number, d in generations(cluster, name, node).items()}


def test_updates_under_load_fail_nobody_and_mix_nothing(cluster: LocalCluster, made: Make, name: str, clients: Any) -> None:
    """Also where the second stage moves to another node, and the answer is the same bits."""
    versions = {1: made(1, "ab"), 2: made(2, "ac"), 3: made(3, "ab")}
    deploy(versions[1].plan, versions[1].shards, name=name)
    with clients(versions[1].address, name, versions) as load:
        for number in (2, 3, 1, 2):
            updated = update(versions[number].plan, versions[number].shards, name=name)
            assert updated.changed
            load.wait_for(number)
    assert (load.failed, load.mixed) == ([], 0)
    assert min(load.answers.values()) >= 20
    assert states(cluster, name, "a") == {4: "kept", 5: "active"}, "older ones have gone"


def test_the_ingress_moves_and_clients_follow(cluster: LocalCluster, made: Make, name: str, clients: Any) -> None:
    versions = {1: made(1, "ab"), 2: made(2, "bc")}
    deploy(versions[1].plan, versions[1].shards, name=name)
    with clients(versions[1].address, name, versions) as load:
        load.wait_for(1)
        assert update(versions[2].plan, versions[2].shards, name=name).ingress == cluster.addresses["b"]
        load.wait_for(2)
        assert go_back(versions[2].plan, name).ingress == cluster.addresses["a"]
        load.wait_for(1)
    assert (load.failed, load.mixed) == ([], 0)
    update(versions[2].plan, versions[2].shards, name=name, keep=False)
    with splitnet.Client(versions[1].address, name) as late:  # who comes later, with the old address
        assert late.address == cluster.addresses["b"]
        inputs = versions[2].inputs(1)
        assert np.array_equal(late.infer(inputs)["output"], versions[2].whole(inputs)["output"])
    moved = generations(cluster, name, "a")
    assert [(d.state, d.moved_to) for d in moved.values()] == [("moved", cluster.addresses["b"])]


def test_a_canary_gets_its_share_and_is_given_up_or_taken(cluster: LocalCluster, made: Make, name: str, clients: Any) -> None:
    versions = {1: made(1, "ab"), 2: made(2, "ac")}
    deploy(versions[1].plan, versions[1].shards, name=name)
    with clients(versions[1].address, name, versions) as load:
        assert update(versions[2].plan, versions[2].shards, name=name, canary=0.1).share == 0.1
        load.wait_for(1, 300)
        seen = generations(cluster, name, "a")
        assert {n: (d.state, round(d.share, 6)) for n, d in seen.items()} == {1: ("active", 0.9), 2: ("canary", 0.1)}
        assert 0.07 <= seen[2].answered / (seen[2].answered + seen[1].answered) <= 0.13
        with pytest.raises(BadInput, match="is being tried with 10%"):
            update(made(3, "ab").plan, made(3, "ab").shards, name=name)
        assert go_back(versions[1].plan, name).generation == 1
        before = load.answers[2]
        load.wait_for(1)
        assert load.answers[2] <= before + 3, "those under way when it was given up"
        update(versions[2].plan, versions[2].shards, name=name, canary=0.5)
        assert update(versions[2].plan, versions[2].shards, name=name, canary=0.9).share == 0.9
        assert update(versions[2].plan, versions[2].shards, name=name).share == 1
        before = load.answers[1]
        load.wait_for(2, 50)
        assert load.answers[1] <= before + 3
    assert (load.failed, load.mixed) == ([], 0)
    assert not update(versions[2].plan, versions[2].shards, name=name).changed


def test_generations_share_the_engines_of_equal_shards(cluster: LocalCluster, made: Make, name: str) -> None:
    one = made(1, "ab")
    again = dataclasses.replace(one.plan, max_in_flight=3)
    deploy(one.plan, one.shards, name=name)
    before = {s.name: s.memory_used_bytes for s in splitnet.status(cluster.cluster())}
    update(again, one.shards, name=name)
    ledger = cluster.server("b").ledger
    engines = {id(stage.engine) for d in ledger.families.held(name) for stage in d.stages.values()}
    assert len(ledger.families.held(name)) == 2
    assert len(engines) == 1
    weights = sum(shard.manifest.param_bytes for stage, shard in one.shards.items() if one.plan.stage(stage).node == "b")
    reserved = sum(stage.reserved_bytes for d in ledger.families.held(name)[:1] for stage in d.stages.values())
    after = {s.name: s.memory_used_bytes for s in splitnet.status(cluster.cluster())}
    assert after["b"] - before["b"] == reserved - weights
    undeploy(one.plan, name)
    assert {s.name: s.memory_used_bytes for s in splitnet.status(cluster.cluster())}["b"] == before["b"] - reserved
    at_rest(cluster)


def test_a_generation_can_be_asked_by_its_key_before_it_serves(cluster: LocalCluster, made: Make, name: str) -> None:
    one, two = made(1, "ab"), made(2, "ab")
    deploy(one.plan, one.shards, name=name)
    update(two.plan, two.shards, name=name, canary=1e-9)
    inputs = two.inputs(1)
    with splitnet.Client(one.address, f"{name}@2") as trying, splitnet.Client(one.address, name) as usual:
        assert np.array_equal(trying.infer(inputs)["output"], two.whole(inputs)["output"])
        assert np.array_equal(usual.infer(inputs)["output"], one.whole(inputs)["output"])


# -------------------------------------------------------------------------------------------------------------- what is refused


def test_a_name_that_is_not_deployed(made: Make, name: str) -> None:
    with pytest.raises(NotFound, match="nothing is deployed under the name"):
        update(made(1, "ab").plan, made(1, "ab").shards, name=name)


def test_nothing_to_go_back_to(made: Make, name: str, cluster: LocalCluster) -> None:
    one = made(1, "ab")
    with pytest.raises(NotFound, match="nothing is deployed"):
        go_back(cluster.cluster(), name)
    deploy(one.plan, one.shards, name=name)
    with pytest.raises(NotFound, match="nothing to go back to"):
        go_back(one.plan, name)
    update(made(2, "ab").plan, made(2, "ab").shards, name=name)
    go_back(one.plan, name)
    with pytest.raises(NotFound, match="nothing to go back to"):
        go_back(one.plan, name)


def test_another_signature_needs_force(made: Make, name: str, cluster: LocalCluster) -> None:
    one, two = made(1, "ab"), made(2, "ab")
    renamed = dataclasses.replace(
        two.plan, outputs=tuple(dataclasses.replace(o, spec=dataclasses.replace(o.spec, name="scores")) for o in two.plan.outputs)
    )
    deploy(one.plan, one.shards, name=name)
    with pytest.raises(BadPlan, match="the outputs of the new plan are scores") as caught:
        update(renamed, two.shards, name=name)
    assert "--force" in caught.value.remedy
    assert states(cluster, name, "a") == {1: "active"}
    update(renamed, two.shards, name=name, force=True)
    with splitnet.Client(one.address, name) as client:
        assert set(client.infer(one.inputs(1))) == {"scores"}


def test_a_canary_at_another_ingress_is_refused(made: Make, name: str) -> None:
    one, two = made(1, "ab"), made(2, "bc")
    deploy(one.plan, one.shards, name=name)
    with pytest.raises(BadInput, match="must share the ingress") as caught:
        update(two.plan, two.shards, name=name, canary=0.1)
    assert "--input-at a" in caught.value.remedy


def test_a_plain_deploy_does_not_replace(made: Make, name: str) -> None:
    deploy(made(1, "ab").plan, made(1, "ab").shards, name=name)
    with pytest.raises(AlreadyExists) as caught:
        deploy(made(2, "ab").plan, made(2, "ab").shards, name=name)
    assert "--update" in caught.value.remedy


def test_an_update_that_fails_to_load_leaves_the_old_one_as_it_was(made: Make, name: str, cluster: LocalCluster) -> None:
    one, two = made(1, "ab"), made(2, "ab")
    no_input = dataclasses.replace(two.plan, model_sha256="0" * 64)
    deploy(one.plan, one.shards, name=name)
    with pytest.raises(BadPlan):
        update(no_input, two.shards, name=name)
    for node in "ab":
        assert states(cluster, name, node) == {1: "active"}
    with splitnet.Client(one.address, name) as client:
        assert np.array_equal(client.infer(one.inputs(1))["output"], one.whole(one.inputs(1))["output"])


async def test_switch_calls_that_make_no_sense(cluster: LocalCluster, made: Make, name: str) -> None:
    one = made(1, "ab")
    await splitnet.deploy_async(one.plan, one.shards, name=name)
    async with open_channel(cluster.addresses["a"]) as channel:
        for request, error in (
            (pb.SwitchRequest(deployment=name, generation=9, share=1.0), NotFound),
            (pb.SwitchRequest(deployment="nobody", generation=1, share=1.0), NotFound),
            (pb.SwitchRequest(deployment=name, generation=1, share=2.0), BadInput),
            (pb.SwitchRequest(deployment=name, generation=1, share=0.5), BadInput),
        ):
            with pytest.raises(error), translated("a"):
                await stub(channel).Switch(request)
        with pytest.raises(BadPlan, match="key"), translated("a"):
            await stub(channel).Activate(
                pb.ActivateRequest(deployment=f"{name}@2", plan_json=one.plan.to_json().encode(), node="a", generation=3)
            )


def test_too_little_memory_for_both(made: Make, tmp_path: Path) -> None:
    """The kept one goes first; then it is said what is missing; --replace takes the old one off before."""
    probe = made(1, "a")
    (need,) = [sum(s.manifest.param_bytes + s.manifest.activation_bytes for s in probe.shards.values())]
    received = 2 * sum(t.bytes for t in probe.plan.transfers if t.target)
    with LocalCluster(1, memory_bytes=2 * (need + received) + 100) as small:
        cuts = {n: split(version(n), small.cluster(), tmp_path / str(n), PLACES["a"]) for n in (1, 2, 3)}
        deploy(cuts[1].plan, cuts[1].shards, name="m")
        update(cuts[2].plan, cuts[2].shards, name="m")
        assert update(cuts[3].plan, cuts[3].shards, name="m").kept == 2, "generation 1 had to go for it"
        assert states(small, "m", "a") == {2: "kept", 3: "active"}
    with LocalCluster(1, memory_bytes=need + received + 100) as tight:
        cuts = {n: split(version(n), tight.cluster(), tmp_path / f"tight{n}", PLACES["a"]) for n in (1, 2)}
        deploy(cuts[1].plan, cuts[1].shards, name="m")
        with pytest.raises(InsufficientMemory, match=rf"{need + received - 100} bytes are missing on node 'a'") as caught:
            update(cuts[2].plan, cuts[2].shards, name="m")
        assert "--replace" in caught.value.remedy
        update(cuts[2].plan, cuts[2].shards, name="m", replace=True)
        with splitnet.Client(cuts[2].address, "m") as client:
            assert np.array_equal(client.infer(cuts[2].inputs(1))["output"], cuts[2].whole(cuts[2].inputs(1))["output"])
        at_rest(tight)


# --------------------------------------------------------------------------------------------------------------- from the command line


def run(command: Any, *arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands(cluster: LocalCluster, made: Make, name: str, saved: Callable[[Split, str], Path], tmp_path: Path) -> None:
    one, two = saved(made(1, "ab"), "one"), saved(made(2, "ac"), "two")
    where = tmp_path / "cluster.toml"
    cluster.cluster().save(where)
    run(deploy_command, str(one), "--name", name)
    assert "gets 25% of the new requests" in run(deploy_command, str(two), "--name", name, "--update", "--canary", "25%")
    assert f"{name}@2* (canary, 25%)" in run(status_command, "--cluster", str(where))
    assert "updated" in run(deploy_command, str(two), "--name", name, "--update")
    assert f"{name}* (kept)" in run(status_command, "--cluster", str(where))
    document = json.loads(run(rollback, name, "--cluster", str(where), "--json"))
    assert (document["generation"], document["before"]) == (1, 2)
    usage = CliRunner().invoke(deploy_command, [str(two), "--canary", "10%"])
    assert usage.exit_code == 2
    assert "goes with --update" in usage.output
    for share in ("0%", "101%", "x"):
        assert CliRunner().invoke(deploy_command, [str(two), "--update", "--canary", share]).exit_code == 2


def test_the_word_that_a_deployment_has_moved_travels() -> None:
    from splitnet.channel import from_failure, to_failure

    error = from_failure(to_failure(Moved("gone", address="10.0.0.7:7001", node="a")))
    assert isinstance(error, Moved)
    assert (error.address, error.node) == ("10.0.0.7:7001", "a")

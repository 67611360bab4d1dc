"""`splitnet deploy`, `status` and `unload` as a user meets them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from chain_model import MakeChain

from nodes.testing import LocalCluster
from splitnet import Plan
from splitnet.cli import run_command
from splitnet.commands.deploying import deploy
from splitnet.commands.install import status, unload

Said = tuple[int, str, str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command; gives its exit status, its output and its complaints."""

    def run(command: click.Command, *arguments: object) -> Said:
        code = run_command(command, [str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def files(tmp_path: Path, nodes: LocalCluster, make_chain: MakeChain) -> tuple[Path, Path]:
    """plan.json with plan.shards beside it, and cluster.toml."""
    plan, _ = make_chain(nodes.cluster())
    (tmp_path / "model0-96.shards").rename(tmp_path / "plan.shards")
    plan.save(tmp_path / "plan.json")
    nodes.cluster().save(tmp_path / "cluster.toml")
    return tmp_path / "plan.json", tmp_path / "cluster.toml"


def test_from_deploy_to_unload(say: Callable[..., Said], files: tuple[Path, Path], nodes: LocalCluster) -> None:
    plan, cluster = files
    code, out, err = say(deploy, plan, "--name", "search")
    assert (code, err) == (0, "")
    assert out.startswith(f"deployed 'search': send requests to {nodes.addresses['a']}\n")
    assert "stage1" in out
    assert "KiB" in out
    assert "nothing new" not in out

    code, out, _ = say(deploy, plan, "--name", "search", "--json")
    assert code == 0
    assert json.loads(out)["sent_bytes"] == {"a": 0, "b": 0, "c": 0}

    code, out, err = say(status, "--cluster", cluster)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["node", "address", "device", "memory", "deployment", "stage", "engine", "requests", "failed", "in", "flight", "link", "to", "sent", "goodput", "queued", "codec"]  # fmt: skip
    assert lines[1].split() == [
        "a",
        nodes.addresses["a"],
        "cpu",
        "25.0",
        "KiB",
        "search*",
        "stage0",
        "torch-graph",
        "0",
        "0",
        "0",
        "b",
        "0",
        "B",
        "-",
        "-",
    ]
    assert ["b", nodes.addresses["b"]] in [line.split()[:2] for line in lines]
    assert lines[-1] == "* takes the requests of clients"

    code, out, _ = say(status, "--cluster", plan, "--json")
    assert code == 0
    assert [node["deployments"][0]["stages"][0]["name"] for node in json.loads(out)] == ["stage0", "stage1", "stage2"]

    assert say(unload, "search", "--cluster", cluster, "--delete") == (0, "unloaded 'search' from a, b, c\n", "")
    code, out, err = say(unload, "search", "--cluster", cluster)
    assert (code, out) == (2, "")
    assert err == "error: no node has a deployment 'search'; there are: none\n  remedy: see `splitnet status`\n"


def test_a_node_that_is_gone(say: Callable[..., Said], files: tuple[Path, Path], nodes: LocalCluster) -> None:
    plan, cluster = files
    nodes.kill("b")
    code, out, err = say(status, "--cluster", cluster)
    assert code == 1
    assert f"b     {nodes.addresses['b']}  -" in out
    assert "does not answer" in out
    assert f"node 'b' at {nodes.addresses['b']}: no node answers" in err
    code, out, err = say(deploy, plan)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: node 'b' at {nodes.addresses['b']}: no node answers")
    assert "remedy: start `splitnet node` there" in err
    assert "Traceback" not in err


def test_what_a_user_gets_wrong(say: Callable[..., Said], files: tuple[Path, Path], tmp_path: Path) -> None:
    plan, cluster = files
    (tmp_path / "words.json").write_text("hello")
    (tmp_path / "old.json").write_text(plan.read_text().replace('"version": 1', '"version": 0'))
    (tmp_path / "words.toml").write_text("hello")
    for arguments, message in (
        ((deploy, tmp_path / "none.json"), "cannot read the plan"),
        ((deploy, tmp_path / "words.json"), "the plan is not JSON"),
        ((deploy, tmp_path / "old.json"), "the plan has version 0, this splitnet reads version 1"),
        ((deploy, plan, "--shards", tmp_path / "elsewhere"), "no shard for stage 'stage0'"),
        ((deploy, plan, "--name", "no good"), "deployment name 'no good'"),
        ((deploy,), "Missing argument 'PLAN'"),
        ((status, "--cluster", tmp_path / "none.toml"), "cannot read the cluster file"),
        ((status, "--cluster", tmp_path / "words.toml"), "not TOML"),
        ((status,), "Missing option '--cluster'"),
        ((unload, "x", "--cluster", cluster, "--drain", "-1"), "--drain"),
        ((unload, "x", "--cluster", cluster), "no node has a deployment 'x'; there are: none"),
    ):
        code, out, err = say(*arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert "Traceback" not in err


def test_a_plan_for_another_model(say: Callable[..., Said], files: tuple[Path, Path]) -> None:
    plan, _ = files
    other = dataclasses.replace(Plan.load(plan), model_sha256="1" * 64)
    other.save(plan)
    code, _, err = say(deploy, plan)
    assert code == 2
    assert "stage 'stage0': the plan is for model 'hf:someone/Chain Model' (111111111111), the shard" in err
    assert "remedy: cut the model for this plan" in err


def test_a_shard_that_was_damaged(say: Callable[..., Said], files: tuple[Path, Path]) -> None:
    plan, _ = files
    file = plan.with_suffix(".shards") / "stage1" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, err = say(deploy, plan)
    assert code == 2
    assert f"{file.parent}: weights.safetensors: truncated" in err


@pytest.mark.parametrize("command", [deploy, status, unload])
def test_help_has_an_example(say: Callable[..., Said], command: click.Command) -> None:
    code, out, _ = say(command, "--help")
    assert code == 0
    assert "Example" in out
    assert f"splitnet {command.name}" in out


def test_the_public_names_are_functions_however_they_are_imported() -> None:
    """No module may take the place of `splitnet.deploy` or `splitnet.status`."""
    import splitnet.install
    import splitnet.node_status

    assert splitnet.deploy is splitnet.install.deploy
    assert callable(splitnet.status)
    assert callable(splitnet.undeploy)

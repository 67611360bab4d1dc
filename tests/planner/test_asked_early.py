"""A misspelt wish is told at once, with exit status 2, and not after the model was loaded and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from partitioner import cli
from partitioner.asked import check_asked
from splitnet.cli import run_command
from splitnet.cluster import Cluster, ClusterNode, CodecSpeed, Link
from splitnet.errors import BadCluster, BadInput, NoPlan

ZSTD = (CodecSpeed("zstd", 1e9, 1e9, 1.2),)
CLUSTER = Cluster(
    tuple(ClusterNode(name, f"127.0.0.1:{port}", codecs=ZSTD) for name, port in (("a", 1), ("b", 2), ("c", 3))),
    (Link("a", "b", 1e6, 0.001), Link("b", "a", 1e6, 0.001)),
)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MODEL `py:untouched:build` leaves a mark where it is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "untouched.py").write_text("open('loaded', 'w').close()\nraise ImportError('it was loaded')\n")
    CLUSTER.save(tmp_path / "cluster.toml")
    (tmp_path / "odd.toml").write_text("[made-up]\nratio = 2\n")
    (tmp_path / "wrong.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "word.toml").write_text('[int8]\nratio = "four"\n')
    (tmp_path / "speed.toml").write_text("[int8]\nspeed = 1\n")
    (tmp_path / "lines.txt").write_text("a\n")
    (tmp_path / "taken.shards").write_text("")
    return tmp_path


def plan(*options: str) -> int:
    given = list(options)
    for option, default in (("--cluster", "cluster.toml"), ("-o", "plan.json")):
        if option not in given:
            given += [option, default]
    return run_command(cli.plan, ["py:untouched:build", *given])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pin head=z", "pin: there is no node 'z'; there are a, b, c"),
        ("--pin head", "--pin: expected PATTERN=NODE"),
        ("--pin head=a --pin head=b", "pinned to more than one node"),
        ("--forbid z", "no node 'z'"),
        ("--forbid z=head", "no node 'z'"),
        ("--forbid a --forbid b --forbid c", "every node of the cluster is forbidden"),
        ("--forbid a --pin head=a", "which is forbidden"),
        ("--input-at z", "input_at: there is no node 'z'"),
        ("--output-at z", "output_at: there is no node 'z'"),
        ("--private z=2", "private: there is no node 'z'"),
        ("--private a=2 --input-at b", "private keeps the raw input on 'a'"),
        ("--taken z=1GiB", "taken: there is no node 'z'"),
        ("--taken a=1GiB,1.5", "the share be within [0, 1)"),
        ("--taken a=much", "--taken: expected NODE=SIZE"),
        ("--taken a=nanGiB", "--taken: expected NODE=SIZE"),
        ("--taken a=infGiB", "--taken: expected NODE=SIZE"),
        ("--taken a=1GiB --taken a=2GiB", "--taken: 'a' stands there twice"),
        ("--codec a->z=raw", "link_codecs: there is no node 'z'"),
        ("--codec a=raw", "--codec: expected A->B=CODEC"),
        ("--codec a->b=nothing", "no figures for the codec 'nothing'"),
        ("--codec a->b=int8", "no figures for the codec 'int8'; there are for raw, zstd"),
        ("--codec a->b=raw --codec a->b=zstd", "--codec: 'a->b' stands there twice"),
        ("--codec-figures missing.toml", "cannot read 'missing.toml'"),
        ("--codec-figures odd.toml", "there is no codec 'made-up'"),
        ("--codec-figures wrong.toml", "wrong.toml is not TOML"),
        ("--codec-figures word.toml", "int8.ratio: expected a number"),
        ("--codec-figures speed.toml", "int8 has no figure 'speed'"),
        ("--on a --on b", "it needs `at`"),
        ("--at head --on a", "1 cut makes 2 stages, but there are 1 nodes"),
        ("--at head --on a --on a", "'a' stands there twice"),
        ("--at head --on a --on z", "no node 'z'"),
        ("--at head --on a --on b --forbid b", "'b', which is forbidden"),
        ("--at head --at head", "'head' stands there twice"),
        ("--at head --stages 2", "cuts by hand say how many stages there are"),
        ("--stages 4", "4 stages were asked for, but there are 3 nodes"),
        ("--stages 0", "neither a number of at least 1"),
        ("--stages 2..3 --max-stages 1", "at least 2 stages were asked for, and at most 1"),
        ("--stages 3 --max-stages 2", "3 stages were asked for, and at most 2"),
        ("--tolerance nan", "tolerance"),
        ("--margin nan", "margin"),
        ("--lossless --max-accuracy-loss 0.5%", "contradict each other"),
        ("--cluster missing.toml", "cannot read the cluster file 'missing.toml'"),
        ("--cluster wrong.toml", "not TOML"),
        ("--profile missing.json", "missing.json"),
        ("--calibration missing.json", "missing.json"),
        ("--from-bench missing.json", "missing.json"),
        ("--data missing.npz", "missing.npz"),
        ("-o nowhere/plan.json", "there is no folder 'nowhere'"),
        ("-o plan.shards", "a folder 'plan.shards' is to stand beside 'plan.shards'"),
        ("-o taken.json", "a folder 'taken.shards' is to stand beside 'taken.json'"),
        ("-o .", "is a directory"),
        ("--draw plan.pdf", "cannot draw into 'plan.pdf'"),
        ("--size batch=none", "is not SYMBOL=N"),
    ],
)
def test_before_the_model_is_loaded(shop: Path, capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    assert plan(*options.split()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert not (shop / "loaded").exists()
    assert not (shop / "plan.json").exists()


def test_what_is_right_goes_on_to_the_model(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or the test above would pass for a command that refuses everything."""
    right = "--pin head=a --forbid c --taken b=1GiB,0.5 --codec a->b=zstd,raw --stages 1..2 --max-stages 2 --lossless --draw plan.html"
    assert plan(*right.split()) == 2
    assert "it was loaded" in capsys.readouterr().err
    assert (shop / "loaded").exists()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (cli.profile, "py:untouched:build -o nowhere/p.json"),
        (cli.profile, "py:untouched:build -o p.json --cluster missing.toml"),
        (cli.probe, "--node 127.0.0.1:1 -o nowhere/cluster.toml"),
        (cli.bench, "plan.json -o nowhere/bench.json"),
    ],
)
def test_other_commands_that_take_long(shop: Path, capsys: pytest.CaptureFixture[str], command: Any, arguments: str) -> None:
    assert run_command(command, arguments.split()) == 2
    assert "nowhere" in (said := capsys.readouterr().err) or "missing.toml" in said
    assert not (shop / "loaded").exists()


@pytest.mark.parametrize("arguments", ["--data gone.txt", "--data lines.txt --codec nothing", "--data lines.txt -o nowhere/c.json"])
def test_calibrate(shop: Path, capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    from partitioner.calibrate_command import calibrate

    assert run_command(calibrate, ["py:untouched:build", "--metric", "mse", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert any(text in said for text in ("gone.txt", "'nothing'", "nowhere"))
    assert not (shop / "loaded").exists()


def test_by_the_library() -> None:
    asked = check_asked(CLUSTER, at=["x"], nodes=["b", "a"], forbid=["c"], max_accuracy_loss=0.1)
    assert [node.name for node in asked.chosen] == ["b", "a"]
    assert [node.name for node in asked.usable] == ["a", "b"]
    assert check_asked(CLUSTER, stages=range(2, 9)).stages == range(2, 4)
    with pytest.raises(BadCluster):
        check_asked(CLUSTER, forbid=["z"])
    with pytest.raises(NoPlan):
        check_asked(CLUSTER, stages=5)
    with pytest.raises(BadInput):
        check_asked(CLUSTER, tolerance=1.0)

"""A testbed that runs: real nodes, told apart by the relay, and nothing left of it afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testbed import cpu
from testbed.bed import Testbed
from testbed.spec import BedSpec, NodeSpec, parse

from partitioner.bandwidth import survey
from splitnet import background
from splitnet.cluster import Cluster
from splitnet.errors import BadInput

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "testbed.py"
LINKED = {
    "nodes": [{"name": "a"}, {"name": "b", "memory": "64MiB"}],
    "links": [{"from": "a", "to": "b", "bandwidth_mbit_per_s": 20, "latency_ms": 20}],
}


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(parse(LINKED)) as running:
        yield running


def alive(pid: int) -> bool:
    """Zombies are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_nodes_measure_the_links_that_were_asked_for(bed: Testbed) -> None:
    found = background.run(survey(list(bed.addresses.values()), budget_s=0.6)).cluster
    shaped, free = found.link("a", "b"), found.link("b", "a")
    assert shaped is not None
    assert free is not None
    # Both ends of a round trip: 20 ms there, none back.
    assert 0.01 <= shaped.latency_s < 0.05
    assert shaped.bandwidth_bytes_per_s < 1.1 * 20e6 / 8  # never faster; how much slower is the machine's affair
    assert free.bandwidth_bytes_per_s > 4 * shaped.bandwidth_bytes_per_s
    assert found.node("b").memory_bytes == 64 << 20
    accepted = bed.report()["accepted"]
    assert accepted["a->b"] >= 1
    assert accepted["b->a"] >= 1
    assert accepted["->a"] >= 1


def test_the_cluster_file_is_a_cluster(bed: Testbed) -> None:
    cluster = Cluster.load(bed.cluster_file)
    assert cluster == bed.cluster()
    assert {node.name: node.address for node in cluster.nodes} == bed.addresses


def test_links_change_while_the_nodes_run(bed: Testbed) -> None:
    before = {name: bed.pid(name) for name in bed.spec.names}
    assert bed.report()["delayed"] == ["a->b"]
    at_a = parse({**LINKED, "client": {"at": "a"}})
    try:
        bed.reshape(at_a.at_bandwidth(1e6))
        assert bed.cluster().link("a", "b").bandwidth_bytes_per_s == 1e6  # type: ignore[union-attr]
        assert bed.report()["delayed"] == ["->b", "a->b"]
        with bed.free_for_clients():
            assert bed.report()["delayed"] == ["a->b"]
        assert bed.report()["delayed"] == ["->b", "a->b"]
    finally:
        bed.reshape(parse(LINKED))
    assert bed.report()["delayed"] == ["a->b"]
    assert {name: bed.pid(name) for name in bed.spec.names} == before


def test_nothing_stays_behind() -> None:
    with Testbed(BedSpec((NodeSpec("x"),))) as bed:
        pid, folder = bed.pid("x"), bed.folder
        assert alive(pid)
        assert folder.is_dir()
    assert not alive(pid)
    assert not folder.exists()


def test_a_testbed_that_is_killed_takes_its_nodes_with_it(tmp_path: Path) -> None:
    file = tmp_path / "bed.toml"
    file.write_text('[[nodes]]\nname = "x"\n')
    told = tmp_path / "told"
    command = [
        sys.executable,
        str(SCRIPT),
        "up",
        "--quiet",
        str(file),
        "--",
        sys.executable,
        "-c",
        f"open({str(told)!r}, 'w').write('up'); input()",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}) as testbed:
        assert until(told.exists, 60)
        children = [int(p) for p in Path(f"/proc/{testbed.pid}/task/{testbed.pid}/children").read_text().split()]
        assert len(children) == 3  # relay, node, command
        testbed.kill()
    assert until(lambda: not any(alive(pid) for pid in children))


def test_a_command_runs_against_it_and_its_status_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "bed.toml"
    file.write_text('[[nodes]]\nname = "x"\n')
    check = "import os, sys; from splitnet import Cluster, status; c = Cluster.load(sys.argv[1]); "
    check += "assert os.environ['SPLITNET_CLUSTER'] == sys.argv[1]; sys.exit(7 if [n.name for n in status(c)] == ['x'] else 1)"
    command = [sys.executable, str(SCRIPT), "up", "--quiet", str(file), "--", sys.executable, "-c", check, "{cluster}"]
    assert subprocess.run(command, timeout=100, check=False).returncode == 7


def test_a_wrong_file_is_one_clear_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "up", str(tmp_path / "no")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "cannot read the testbed file" in done.stderr
    assert "Traceback" not in done.stderr


def test_more_shares_than_processors_are_refused() -> None:
    there = len(os.sched_getaffinity(0))
    with pytest.raises(BadInput, match=f"add up to {there + 1:g} processors"), Testbed(BedSpec((NodeSpec("x", cpu=there + 1),))):
        pass


@pytest.mark.skipif(isinstance(cpu.controller(), str), reason=f"no CPU shares here: {cpu.controller()}")
def test_a_share_holds_a_process_back() -> None:
    parent = cpu.controller()
    assert isinstance(parent, Path)
    code = "import time; end = time.monotonic() + 0.6\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
    launch = SCRIPT.parent / "testbed" / "launch.py"
    with cpu.shares({"x": 0.3, "free": 0.0}, parent) as shares:
        assert list(shares) == ["x"]
        command = [sys.executable, str(launch), "--group", str(shares["x"].tasks), "--", sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert 0.05 < float(done.stdout) < 0.4  # of 0.6 s, with the interpreter's start
        assert shares["x"].throttled_s() > 0.1
        directory = shares["x"].directory
    assert not directory.exists()


def test_why_there_are_no_shares_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts, groups = tmp_path / "mountinfo", tmp_path / "cgroup"
    mounts.write_text("30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    groups.write_text("0::/user\n")
    assert "no cgroup v1 cpu controller" in str(cpu.controller(mounts, groups))
    mounts.write_text(f"30 25 0:26 / {tmp_path} rw - cgroup cgroup rw,cpu,cpuacct\n")
    groups.write_text("1:cpu,cpuacct:/none\n")
    assert "has no cpu.cfs_quota_us" in str(cpu.controller(mounts, groups))
    monkeypatch.setattr(cpu, "controller", lambda: "of a test's making")
    with Testbed(BedSpec((NodeSpec("x", cpu=0.5),))) as bed:
        assert "CPU shares are NOT applied, every node may use all processors: of a test's making; asked for: x (0.5)" in bed.notes


def test_sigterm_stops_it_in_order(tmp_path: Path) -> None:
    file = tmp_path / "bed.toml"
    file.write_text('[[nodes]]\nname = "x"\n')
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, str(SCRIPT), "up", str(file)], stderr=subprocess.PIPE, text=True, env=environment) as testbed:
        assert testbed.stderr is not None
        for line in testbed.stderr:
            if line.startswith("Ctrl-C"):
                break
        testbed.send_signal(signal.SIGTERM)
        assert testbed.wait(30) == 128 + signal.SIGTERM
    assert list(tmp_path.glob("splitnet-testbed-*")) == []

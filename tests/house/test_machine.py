"""How many processors a process may use: control groups of both versions, as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitnet.machine import Quota, cpu_quota, machine_id, usable_processors


def proc(folder: Path, groups: str, mounts: str) -> tuple[Path, Path]:
    (folder / "cgroup").write_text(groups)
    (folder / "mountinfo").write_text(mounts)
    return folder / "cgroup", folder / "mountinfo"


def test_the_least_quota_of_a_version_1_group_and_those_around_it(tmp_path: Path) -> None:
    root = tmp_path / "cpu"
    inner = root / "box" / "node"
    inner.mkdir(parents=True)
    for folder, quota in ((root, -1), (root / "box", 5000), (inner, 20000)):
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("10000\n")
    mounts = f"30 25 0:26 / {root} rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n31 25 0:27 / /elsewhere rw - cgroup cgroup rw,memory\n"
    files = proc(tmp_path, "5:memory:/x\n4:cpu,cpuacct:/box/node\n", mounts)
    found = cpu_quota(*files)
    assert found is not None
    assert found.processors == 0.5
    (root / "box" / "cpu.cfs_quota_us").write_text("-1")
    wider = cpu_quota(*files)
    assert wider == Quota(2.0, f"{inner.stat().st_dev}:{inner.stat().st_ino}")
    assert wider.group != found.group


def test_the_quota_of_a_version_2_group_as_a_container_sees_it(tmp_path: Path) -> None:
    root = tmp_path / "unified"
    root.mkdir()
    (root / "cpu.max").write_text("150000 100000\n")
    files = proc(tmp_path, "0::/\n", f"30 25 0:26 / {root} ro,nosuid - cgroup2 cgroup rw\n")
    found = cpu_quota(*files)
    assert found is not None
    assert found.processors == 1.5
    (root / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(*files) is None


@pytest.mark.parametrize("quota", ["", "what 3", "10000", "1 0"])
def test_what_cannot_be_read_is_no_quota(tmp_path: Path, quota: str) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    assert cpu_quota(*proc(tmp_path, "0::/\n", f"30 25 0:26 / {tmp_path} rw - cgroup2 cgroup rw\n")) is None
    assert cpu_quota(tmp_path / "no such file", tmp_path / "nor this") is None


def test_this_process_may_use_some_processors_and_stands_on_one_machine() -> None:
    assert usable_processors() > 0
    assert machine_id() == machine_id()
    box, _, cores = machine_id().partition("/")
    assert box
    assert cores

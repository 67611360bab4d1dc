"""What a testbed file may say, and what is said of one that is wrong."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import pytest
from testbed.shaping import UNSHAPED, LinkShape
from testbed.spec import CLIENT, load, parse, preset_names

from splitnet.errors import BadInput

GOOD = """
[[nodes]]
name = "a"
cpu = 0.5
threads = 2
memory = "1GiB"
[[nodes]]
name = "b"
[[nodes]]
name = "c"
[[links]]
between = ["a", "b"]
bandwidth_mbit_per_s = 8
latency_ms = 5
[[links]]
from = "b"
to = "a"
bandwidth_mbit_per_s = 80
[[links]]
between = ["client", "c"]
latency_ms = 7
[default_link]
latency_ms = 1
[client]
at = "a"
"""


def test_a_file_is_read() -> None:
    spec = parse(tomllib.loads(GOOD))
    assert [(n.name, n.cpu, n.threads, n.memory_bytes) for n in spec.nodes] == [("a", 0.5, 2, 1 << 30), ("b", 0, 1, 0), ("c", 0, 1, 0)]
    assert spec.shape("a", "b") == LinkShape(1e6, 0.005)
    assert spec.shape("b", "a") == LinkShape(1e7, 0.0)  # one direction goes before both
    assert spec.shape("b", "c") == LinkShape(math.inf, 0.001)
    assert spec.shape(CLIENT, "a") == UNSHAPED  # the client stands there
    assert spec.shape(CLIENT, "b") == spec.shape("a", "b")
    assert spec.shape("b", CLIENT) == spec.shape("b", "a")
    assert spec.shape(CLIENT, "c") == LinkShape(math.inf, 0.007)  # a link of its own goes before


def test_a_burst_is_read() -> None:
    spec = parse({"nodes": [{"name": "a"}], "default_link": {"bandwidth_mbit_per_s": 8, "burst_kib": 64}})
    assert spec.default == LinkShape(1e6, burst_bytes=65536)


def test_the_cluster_has_the_configured_links() -> None:
    cluster = parse(tomllib.loads(GOOD)).cluster({"a": "h:1", "b": "h:2", "c": "h:3"})
    assert (cluster.node("a").memory_bytes, cluster.node("a").threads) == (1 << 30, 2)
    link = cluster.link("a", "b")
    assert link is not None
    assert (link.bandwidth_bytes_per_s, link.latency_s) == (1e6, 0.005)
    assert len(cluster.links) == 6


def test_a_sweep_changes_what_is_shaped() -> None:
    spec = parse(tomllib.loads(GOOD)).at_bandwidth(125.0)
    assert spec.shape("a", "b") == LinkShape(125.0, 0.005)
    assert spec.shape("b", "c") == LinkShape(125.0, 0.001)
    assert spec.shape(CLIENT, "a") == UNSHAPED


@pytest.mark.parametrize("name", preset_names())
def test_presets_can_run_on_two_processors(name: str) -> None:
    spec = load(name)
    assert spec.description
    assert len(spec.nodes) >= 2
    assert all(spec.shape(a, b) != UNSHAPED for a in spec.names for b in spec.names if a != b)
    assert 0 < spec.cores <= 1.8


def test_there_are_the_five_presets() -> None:
    assert preset_names() == ["4g", "factory", "gigabit-lan", "home-wifi", "two-tier"]


NODES = '[[nodes]]\nname = "a"\n[[nodes]]\nname = "b"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs nodes"),
        ("nodes = 1", r"nodes: expected tables \[\[nodes\]\], got int"),
        ("[[nodes]]\ncpu = 1", r"nodes\[0\].name: missing"),
        ('[[nodes]]\nname = "client"', "stands for whoever sends requests"),
        ('[[nodes]]\nname = "a b"', r"nodes\[0\]: --name 'a b'"),
        ('[[nodes]]\nname = "a"\ncpu = "fast"', r"nodes\[0\].cpu: expected a number, got 'fast'"),
        ('[[nodes]]\nname = "a"\ncpu = 0', r"nodes\[0\].cpu: expected a number above 0, got 0"),
        ('[[nodes]]\nname = "a"\ncpu = nan', r"nodes\[0\].cpu: expected a number above 0, got nan"),
        ('[[nodes]]\nname = "a"\nthreads = 0', r"nodes\[0\]: threads must be at least 1"),
        ('[[nodes]]\nname = "a"\nthreads = 1.5', r"nodes\[0\].threads: expected a whole number"),
        ('[[nodes]]\nname = "a"\nmemory = "much"', r"nodes\[0\]: .*'much'"),
        ('[[nodes]]\nname = "a"\ncolour = "red"', r"nodes\[0\]: unknown key 'colour'; it may have cpu, memory, name, threads"),
        ('[[nodes]]\nname = "a"\n[[nodes]]\nname = "a"', "node 'a' stands twice"),
        (NODES + "speed = 1", r"nodes\[1\]: unknown key 'speed'"),
        ("fast = true\n" + NODES, "the file: unknown key 'fast'"),
        ('shaping = "magic"\n' + NODES, "shaping: expected one of relay, kernel, got 'magic'"),
        (NODES + "[[links]]\nlatency_ms = 1", r"links\[0\]: expected between"),
        (NODES + '[[links]]\nbetween = ["a", "b"]\nfrom = "a"', r"links\[0\]: expected between"),
        (NODES + '[[links]]\nbetween = ["a", "a"]', r"links\[0\]: a link joins two different nodes"),
        (NODES + '[[links]]\nbetween = ["a", "z"]', r"links\[0\]: no node 'z'; there are a, b, and client"),
        (NODES + '[[links]]\nfrom = "a"\nto = "b"\n[[links]]\nfrom = "a"\nto = "b"', r"links\[1\]: the link 'a' -> 'b' stands twice"),
        (
            NODES + '[[links]]\nbetween = ["a", "b"]\nbandwidth_mbit_per_s = 0',
            r"links\[0\].bandwidth_mbit_per_s: expected a number above 0",
        ),
        (NODES + '[[links]]\nbetween = ["a", "b"]\nlatency_ms = -1', r"links\[0\].latency_ms: expected a number of at least 0"),
        (NODES + "[default_link]\nloss = 0.1", "default_link: unknown key 'loss'"),
        (NODES + '[client]\nat = "z"', "client.at: no node 'z'"),
        ("client = 3\n" + NODES, "client: expected a table, got int"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse(tomllib.loads(text))


def test_a_fault_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "bed.toml"
    file.write_text("nodes = [")
    with pytest.raises(BadInput, match=r"bed\.toml: not TOML"):
        load(str(file))
    file.write_text("[[nodes]]\n")
    with pytest.raises(BadInput, match=r"bed\.toml: nodes\[0\]\.name: missing"):
        load(str(file))
    with pytest.raises(BadInput, match="cannot read the testbed file") as caught:
        load(str(tmp_path / "none.toml"))
    assert "two-tier" in caught.value.remedy

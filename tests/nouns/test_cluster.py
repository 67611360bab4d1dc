from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.errors import BadCluster

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
FIGURES = st.floats(min_value=0, allow_nan=False, allow_infinity=False)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    nodes = tuple(
        ClusterNode(
            name, f"host{i}:{draw(st.integers(1, 65535))}", draw(st.integers(0, 2**40)), "cpu", draw(st.integers(1, 64)), draw(FIGURES)
        )
        for i, name in enumerate(names)
    )
    pairs = [(a, b) for a in names for b in names if a != b]
    linked = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return Cluster(nodes, tuple(Link(a, b, draw(FIGURES.filter(lambda x: x > 0)), draw(FIGURES)) for a, b in linked))


@given(cluster=clusters())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> None:
    path = tmp_path_factory.mktemp("cluster") / "cluster.toml"
    cluster.save(path)
    assert Cluster.load(path) == cluster


NODE = '[[nodes]]\nname = "a"\naddress = "127.0.0.1:7001"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no node"),
        ("nodes = 3", r"expected tables \[\[nodes\]\]"),
        ("nodes = [3]", r"nodes\[0\]: expected a table"),
        ("[[nodes]", "not TOML"),
        (NODE + "colour = 1", r"nodes\[0\]: unknown key 'colour'"),
        (NODE + 'threads = "two"', r"nodes\[0\]\.threads: expected int, got 'two'"),
        (NODE + "threads = 0", "threads at least 1"),
        (NODE + "memory_bytes = -1", "must not be negative"),
        (NODE + "reference_s = nan", "must not be negative"),
        ('[[nodes]]\nname = "a"\n', r"nodes\[0\]: .*address"),
        ('[[nodes]]\nname = "a"\naddress = "somewhere"\n', "'somewhere' is not HOST:PORT"),
        (NODE + NODE, "'a' stands twice"),
        (NODE + '[[links]]\nsource = "a"\ntarget = "b"\nbandwidth_bytes_per_s = 1.0\nlatency_s = 0.0\n', "no node 'b'"),
        (NODE + '[[links]]\nsource = "a"\ntarget = "a"\nbandwidth_bytes_per_s = 1.0\nlatency_s = 0.0\n', "joins a node to itself"),
        ("surprise = 1\n" + NODE, "unknown key 'surprise'"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(BadCluster, match=message) as caught:
        Cluster.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("bandwidth", "latency"), [(0.0, 0.1), (-1.0, 0.1), (float("nan"), 0.1), (1.0, -0.1), (1.0, float("nan")), (1.0, float("inf"))]
)
def test_a_link_has_sane_figures(bandwidth: float, latency: float) -> None:
    nodes = (ClusterNode("a", "h:1"), ClusterNode("b", "h:2"))
    with pytest.raises(BadCluster, match="link 'a' -> 'b'"):
        Cluster(nodes, (Link("a", "b", bandwidth, latency),))


def test_nothing_to_send_takes_no_time() -> None:
    link = Link("a", "b", 1e6, 0.01)
    assert link.seconds(0) == 0
    assert link.seconds(1e6) == pytest.approx(1.01)

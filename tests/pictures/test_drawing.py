"""Pictures of real plans: models that are captured and planned here; times are given, so that plans do not depend on the machine."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

import partitioner.drawing
from partitioner.capturing import capture
from partitioner.drawing import draw
from partitioner.drawing.canvas import WIDTH, new_sheet, style
from partitioner.drawing.pages import Picture, pictures
from partitioner.planning import plan
from partitioner.profiling import HERE, Column, Profile
from splitnet import drawing as splitnet_drawing
from splitnet.cli import cli, run_command
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.errors import BadCluster, BadInput, BadPlan, MissingExtra
from splitnet.explain import bytes_text
from splitnet.plan import Plan

SVG = "{http://www.w3.org/2000/svg}"


class Branches(torch.nn.Module):
    """A stem, three branches of different weight, and a head that joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.branches = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Conv2d(8, 8, k, padding=k // 2), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, k, padding=k // 2))
            for k in (1, 3, 5)
        )
        self.head = torch.nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.stem(x))
        return self.head(torch.cat([branch(y) for branch in self.branches], 1).mean((2, 3)))


def encoder() -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


MODELS: dict[str, Callable[[], tuple[torch.nn.Module, torch.Tensor]]] = {
    "branches": lambda: (Branches(), torch.randn(2, 3, 32, 32)),
    "encoder": lambda: (encoder(), torch.randn(2, 8, 32)),
}


@functools.cache
def profile_of(name: str) -> Profile:
    """Times in proportion to the work, 10 ms in all."""
    torch.manual_seed(0)
    module, example = MODELS[name]()
    structure = capture(module.eval(), (example,), name=name).structure
    work = [0.0 if v.op == "input" else 1e3 + v.flops for v in structure.vertices]
    seconds = tuple(0.010 * w / sum(work) for w in work)
    return Profile(structure, {HERE: Column(seconds, "given")}, "a test", 1, "2", 1, 0.010, reference_s=0.010)


def cluster(bandwidth: float = 2e7, names: tuple[str, ...] = ("strong", "weak", "other")) -> Cluster:
    speeds = itertools.cycle((1.0, 2.0, 1.3))
    nodes = tuple(ClusterNode(n, f"127.0.0.1:{7001 + k}", reference_s=0.010 * next(speeds)) for k, n in enumerate(names))
    return Cluster(nodes, tuple(Link(a, b, bandwidth, 1e-4) for a, b in itertools.permutations(names, 2)))


@functools.cache
def plan_of(name: str, stages: int = 3) -> Plan:
    return plan(profile_of(name), cluster(), objective="throughput", stages=stages)


_made: dict[str, Plan] = {}


def planner(profile: Profile, cluster: Cluster, **options: Any) -> Plan:
    """partitioner.plan, which several tests ask for the same."""
    key = f"{profile.structure.name} {cluster} {options}"
    if key not in _made:
        _made[key] = plan(profile, cluster, **options)
    return _made[key]


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", MODELS)
def test_an_svg_says_what_the_plan_says(name: str, tmp_path: Path) -> None:
    target = tmp_path / "plan.svg"
    chosen = plan_of(name)
    draw(chosen, target, profile=profile_of(name), cluster=cluster(), planner=planner)
    written = texts(target.read_text())
    for stage in chosen.stages:
        assert f"{stage.name} on {stage.node}" in written
    for transfer in chosen.transfers:
        assert any(text.startswith(bytes_text(transfer.bytes)) for text in written), transfer
    everything = "\n".join(written)
    assert "Who works when" in everything
    assert "requests per second" in everything
    assert "bandwidth of every link (Mbit/s)" in everything
    assert "strong alone" in everything
    if name == "encoder":
        assert all(f"layers.{layer}" in everything for layer in range(3))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_written_outside_the_picture_or_over_something_else(name: str, tmp_path: Path) -> None:
    found = pictures(plan_of(name), profile_of(name), cluster(), planner)
    assert [panel.title for panel in found.panels] == [
        "The model, cut",
        "Who works when",
        "What there is to choose from",
        "The best cut against bandwidth",
    ]
    for panel in found.panels:
        for box, text in text_boxes(panel.picture):
            assert box[0] >= -0.5, text
            assert box[2] <= WIDTH + 0.5, text
            assert box[1] >= -0.5, text
            assert box[3] <= panel.picture.height + 0.5, text
        boxes = list(text_boxes(panel.picture))
        for (a, text), (b, other) in itertools.combinations(boxes, 2):
            overlap = min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 2
            assert not overlap, f"{panel.title}: {text!r} lies on {other!r}"


def text_boxes(picture: Picture) -> list[tuple[tuple[float, ...], str]]:
    """The extent of every text as it is rendered, in points from the upper left corner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    with style():
        sheet = new_sheet(picture.height)
        picture.paint(sheet)
        canvas = FigureCanvasAgg(sheet.figure)
        canvas.draw()
        scale, height = 72 / sheet.figure.dpi, picture.height
        found = []
        for text in sheet.figure.findobj(Text):
            if text.get_text().strip() and text.get_visible() and text.axes is not None:
                e = text.get_window_extent(canvas.get_renderer())
                found.append(((e.x0 * scale, height - e.y1 * scale, e.x1 * scale, height - e.y0 * scale), text.get_text()))
    return found


def test_a_png_is_as_large_as_a_phone_shows(tmp_path: Path) -> None:
    draw(plan_of("branches"), tmp_path / "plan.png", profile=profile_of("branches"), cluster=cluster(), planner=planner)
    data = (tmp_path / "plan.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert 800 <= width <= 1200
    assert width <= height <= 20_000
    assert 20_000 < len(data) < 3_000_000


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    chosen = plan_of("branches")
    draw(chosen, tmp_path / "plan.html", profile=profile_of("branches"), cluster=cluster(), planner=planner)
    page = (tmp_path / "plan.html").read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script|<link|<img|@import|src=", page)
    assert '<meta name="viewport" content="width=device-width' in page
    for stage in chosen.stages:
        assert f"{stage.name} on {stage.node}" in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 4
    ids = [i for svg in drawings for i in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in drawings:
        ElementTree.fromstring(svg)
        assert set(re.findall(r"(?:url\(|href=\")#([^\")]+)", svg)) <= set(ids)


def test_what_cannot_be_drawn_is_left_out_and_said(tmp_path: Path) -> None:
    chosen = plan_of("branches")
    chosen.draw(tmp_path / "plan.svg")
    written = " ".join(texts((tmp_path / "plan.svg").read_text()))
    assert "stage1 on" in written
    assert "Who works when" not in written
    assert "The timeline needs the cluster" in written
    chosen.draw(tmp_path / "plan.html", cluster=cluster())
    page = (tmp_path / "plan.html").read_text()
    assert "Who works when" in page
    assert "need the profile and the cluster" in page


def test_one_stage_is_a_picture_too(tmp_path: Path) -> None:
    alone = dataclasses.replace(cluster(), nodes=cluster().nodes[:1], links=())
    chosen = plan(profile_of("encoder"), alone)
    draw(chosen, tmp_path / "plan.svg", profile=profile_of("encoder"), cluster=alone)
    written = texts((tmp_path / "plan.svg").read_text())
    assert "stage0 on strong" in written
    assert "What there is to choose from" in written


def test_many_nodes_are_drawn(tmp_path: Path) -> None:
    names = tuple(f"node-in-the-hall-{k}" for k in range(9))
    wide = cluster(names=names)
    chosen = plan(profile_of("encoder"), wide, objective="throughput", stages=6)
    draw(chosen, tmp_path / "plan.svg", profile=profile_of("encoder"))
    draw(chosen, tmp_path / "times.svg", cluster=wide)
    assert "Who works when" in texts((tmp_path / "times.svg").read_text())
    assert sum(text.startswith("stage") for text in texts((tmp_path / "plan.svg").read_text())) == 6


def test_names_are_text_and_not_markup(tmp_path: Path) -> None:
    strange = cluster(names=("a<b>&", '"c"', "$x^2$"))
    chosen = plan(profile_of("branches"), strange, objective="throughput", stages=3)
    for suffix in ("html", "svg"):
        draw(chosen, tmp_path / f"plan.{suffix}", cluster=strange)
    written = texts((tmp_path / "plan.svg").read_text())
    assert {f"stage{k} on {stage.node}" for k, stage in enumerate(chosen.stages)} <= set(written)
    assert "<b>" not in (tmp_path / "plan.html").read_text()


def test_the_same_plan_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw(plan_of("branches"), tmp_path / name, cluster=cluster())
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_wrong_names_and_wrong_material_are_refused(tmp_path: Path) -> None:
    chosen = plan_of("branches")
    with pytest.raises(BadInput, match=r"plan\.bmp.*\.html, \.png, \.svg"):
        draw(chosen, tmp_path / "plan.bmp")
    with pytest.raises(BadInput, match="no folder"):
        draw(chosen, tmp_path / "nowhere" / "plan.svg")
    with pytest.raises(BadPlan, match="another model"):
        draw(chosen, tmp_path / "plan.svg", profile=profile_of("encoder"))
    with pytest.raises(BadCluster, match="no node"):
        draw(chosen, tmp_path / "plan.svg", cluster=cluster(names=("x", "y")))
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitioner.drawing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"splitnet\[draw\]"):
        plan_of("branches").draw(tmp_path / "plan.svg")


def test_without_a_planner_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitnet_drawing, "entry_points", lambda **_: ())
    with pytest.raises(MissingExtra, match=r"splitnet\[draw\]"):
        plan_of("branches").draw(tmp_path / "plan.svg")


def test_the_command_refuses_a_wrong_suffix_before_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run_command(cli, ["plan", "py:no.such:model", "--cluster", "none.toml", "-o", str(tmp_path / "p.json"), "--draw", "plan.jpeg"])
    assert status == 2
    assert "'plan.jpeg'" in capsys.readouterr().err


def test_the_command_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawn_model.py").write_text(
        "import torch\n\ndef build():\n    torch.manual_seed(0)\n    net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))\n"
        "    return net.eval(), (torch.randn(2, 16),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cluster().save(tmp_path / "cluster.toml")
    profile = Profile.load(_saved_profile(tmp_path))
    assert profile.structure.vertices
    arguments = ["plan", "py:drawn_model:build", "--cluster", str(tmp_path / "cluster.toml"), "--profile", str(tmp_path / "p.profile.json")]
    arguments += ["-o", str(tmp_path / "plan.json"), "--stages", "2", "--draw", str(tmp_path / "plan.html")]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"drew {tmp_path / 'plan.html'}" in result.output
    assert "stage1 on" in (tmp_path / "plan.html").read_text()


def _saved_profile(folder: Path) -> Path:
    from partitioner.sources import load_model

    sys.modules.pop("drawn_model", None)
    structure = load_model("py:drawn_model:build").structure
    seconds = tuple(0.0 if v.op == "input" else 0.001 for v in structure.vertices)
    made = Profile(structure, {HERE: Column(seconds, "given")}, "a test", 1, "2", 1, sum(seconds), reference_s=0.010)
    made.save(folder / "p.profile.json")
    return folder / "p.profile.json"


def test_the_caller_s_settings_are_left_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(plan_of("branches"), tmp_path / "plan.svg")
    assert dict(matplotlib.rcParams) == before

"""Calibration of a network that was really trained, held against the same thing done by hand in torch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from trained_digits import Trained

from partitioner.calibrating import Task, calibrate
from partitioner.calibration import UNMEASURED, Calibration
from partitioner.calibration_cache import CalibrationCache
from partitioner.capturing import capture
from partitioner.cost import CodecFigures
from partitioner.cut_points import chosen_cuts
from partitioner.samples import load_samples
from partitioner.splitting import travel
from splitnet.cli import cli, run_command
from splitnet.codecs import codec_names, get_codec
from splitnet.errors import BadInput, BadModel, BadPlan

SOME = ("raw", "zstd", "bf16", "int8", "int4")


def task_of(trained: Trained, metric: str = "mse", most: int = 60) -> Task:
    return Task.make(trained.graph, load_samples(trained.data, trained.graph.structure, most=most, batch=20), metric)


def by_hand(trained: Trained, layers: int, codec: str) -> tuple[float, float, int]:
    """(top-1 loss, relative squared error, encoded bytes) of a cut after so many layers, in batches of 20."""
    net, found, size = trained.net, [], 0
    assert isinstance(net, torch.nn.Sequential)
    images = np.split(trained.images, 10)
    with torch.no_grad():
        whole = torch.cat([net(torch.from_numpy(part)) for part in images])
        for part in images:
            there = travel(net[:layers](torch.from_numpy(part)).numpy(), codec)
            size += there.sent_bytes
            found.append(net[layers:](torch.from_numpy(there.array)))
    split, labels = torch.cat(found), torch.from_numpy(trained.labels)
    right = [(answers.argmax(1) == labels).double().mean() for answers in (whole, split)]
    return float(right[0] - right[1]), float(((whole - split).double() ** 2).sum() / (whole.double() ** 2).sum()), size


@pytest.mark.parametrize("metric", ["top1", "mse"])
def test_losses_and_bits_are_those_worked_out_by_hand(trained: Trained, metric: str) -> None:
    found = calibrate(task_of(trained, metric, most=200), codecs=SOME)
    modules = {cut.scope: cut for cut in found.cuts}
    assert set(modules) == set("012345")  # after each layer but the last
    assert found.score > 0.9 if metric == "top1" else found.score == 0.0
    for module, cut in modules.items():
        assert cut.bits_per_value("raw") == 32
        for codec in SOME:
            top1, mse, size = by_hand(trained, int(module) + 1, codec)
            assert cut.codecs[codec].loss == pytest.approx(top1 if metric == "top1" else mse, rel=1e-5, abs=1e-12), (module, codec)
            assert cut.codecs[codec].encoded_bytes == size
            assert (cut.codecs[codec].loss == 0.0) >= get_codec(codec).lossless
    if metric == "mse":
        losses = [max(cut.codecs[codec].loss for cut in found.cuts) for codec in SOME]
        assert losses == sorted(losses)
        assert losses[-1] > 1e-4  # four bits are seen


def test_every_codec_of_the_registry_can_be_calibrated(trained: Trained) -> None:
    found = calibrate(task_of(trained, "cosine", most=20), cuts=3)
    assert found.codecs == tuple(name for name in codec_names() if name != "delta")
    assert len(found.cuts) == 3
    assert all(math.isfinite(loss.loss) for cut in found.cuts for loss in cut.codecs.values())


def test_what_is_known_is_not_measured_again(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, task = CalibrationCache(tmp_path), task_of(trained)
    first = calibrate(task, codecs=["raw", "bf16"], cuts=2, cache=cache)
    runs: list[str] = []
    measure = Task.whole
    monkeypatch.setattr(Task, "whole", lambda self, batch: (runs.append("run"), measure(self, batch))[1])
    assert calibrate(task, codecs=["bf16"], cuts=2, cache=cache) == first
    assert not runs
    more = calibrate(task, codecs=["int8"], cuts=2, cache=cache)
    assert runs
    assert [set(cut.codecs) for cut in more.cuts] == [{"raw", "bf16", "int8"}] * 2
    assert all(new.codecs["bf16"] == old.codecs["bf16"] for new, old in zip(more.cuts, first.cuts, strict=True))
    other = calibrate(task_of(trained, "cosine"), codecs=["bf16"], cuts=2, cache=cache)
    assert other.codecs == ("bf16",)
    assert cache.newest(trained.graph.sha256, "mse") == more
    newest = cache.newest(trained.graph.sha256)
    assert newest is not None
    assert newest.model_sha256 == trained.graph.sha256
    assert cache.newest("0" * 64) is None
    runs.clear()
    calibrate(task, codecs=["int8"], cuts=2, cache=cache, refresh=True)
    assert runs
    for file in tmp_path.iterdir():
        file.write_text("{}")
    assert cache.newest(trained.graph.sha256) is None  # a file that cannot be read counts as absent


def test_cuts_are_narrow_spread_and_grouped(trained: Trained) -> None:
    class Deep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)) for _ in range(6)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    structure = capture(Deep(), (torch.zeros(2, 8),), name="deep").structure
    few = chosen_cuts(structure, 5)
    assert len(few) == 5
    assert all(len(point.tensors) == 1 and point.bytes == 2 * 8 * 4 for point in few)  # none inside a block, where two cross
    assert len({point.tensors for point in few}) == 5
    many = chosen_cuts(structure, 100)
    assert len({point.tensors for point in many}) == len(many)
    assert max(len(point.tensors) for point in many) == 2
    assert {point.tensors for point in few} <= {point.tensors for point in many}
    assert calibrate(task_of(trained, most=20), codecs=["raw"], cuts=1, at=["6"]).cuts[-1].bits_per_value("raw") == 32
    with pytest.raises(BadInput, match="no operator 'nonsense'"):
        calibrate(task_of(trained), at=["nonsense"])
    with pytest.raises(BadInput, match="there is nothing to cut"):
        chosen_cuts(capture(torch.nn.Linear(2, 2), (torch.zeros(2, 2),), name="one").structure, 4)


def test_the_document_comes_back_and_strangers_are_refused(trained: Trained, tmp_path: Path) -> None:
    found = calibrate(task_of(trained, most=20), codecs=["raw", "int4"], cuts=2)
    useless = dataclasses.replace(found.cuts[0], codecs={"int4": dataclasses.replace(found.cuts[0].codecs["int4"], loss=math.inf)})
    found = dataclasses.replace(found, cuts=(useless, *found.cuts[1:]))
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found
    for change, message in (
        ({"version": 9}, "version 9, this splitnet reads version 1"),
        ({"cuts": [{"after": []}]}, "not a calibration: KeyError"),
        ({"more": 1}, "not a calibration: TypeError"),
    ):
        with pytest.raises(BadModel, match=message):
            Calibration.from_json(json.dumps({**json.loads(found.to_json()), **change}))
    with pytest.raises(BadModel, match=r"cannot read the calibration .*\n.*splitnet calibrate"):
        Calibration.load(tmp_path / "nothing.json")
    with pytest.raises(BadPlan, match="the calibration is of another model"):
        found.check("0" * 64)


def test_figures_hold_where_they_were_measured_and_nowhere_else(trained: Trained) -> None:
    structure = trained.graph.structure
    found = calibrate(task_of(trained), codecs=["zstd", "int4"], cuts=2)
    speeds = {"raw": CodecFigures(), "zstd": CodecFigures(1.1, 1e8, 1e8), "int4": CodecFigures(7.0, 2e8, 3e8), "int8": CodecFigures(4.0)}
    figures = found.figures(structure, speeds)
    assert figures["raw"] == speeds["raw"]
    measured = {operator: cut for cut in found.cuts for operator in cut.after}
    for vertex in structure.vertices:
        cut = measured.get(vertex.name)
        if not any("float" in value.dtype for value in vertex.values):
            assert (figures["int4"].error_of(vertex.name), figures["int4"].ratio_of(vertex.name)) == (0.0, 1.0)
            continue
        if cut is None:
            assert figures["int4"].error_of(vertex.name) == UNMEASURED
            assert figures["zstd"].ratio_of(vertex.name) == 1.1
        else:
            assert figures["int4"].error_of(vertex.name) == cut.codecs["int4"].loss > 0
            assert figures["int4"].ratio_of(vertex.name) == pytest.approx(cut.raw_bytes / cut.codecs["int4"].encoded_bytes)
            assert figures["zstd"].ratio_of(vertex.name) == cut.ratio("zstd") > 1.1
        assert figures["int8"].error_of(vertex.name) == UNMEASURED
    assert (figures["int4"].encode_bytes_per_s, figures["int4"].decode_bytes_per_s) == (2e8, 3e8)
    assert figures["zstd"].error == 0.0


def test_the_command_tells_and_writes(trained: Trained, own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "calibrate",
        trained.spec,
        "--data",
        str(trained.data),
        "--metric",
        "top1",
        "--codec",
        "bf16",
        "--codec",
        "int4",
        "--cuts",
        "3",
    ]
    assert run_command(cli, [*asked, "--batch", "50", "-o", str(tmp_path / "c.json")]) == 0
    said = capsys.readouterr().out
    found = Calibration.load(tmp_path / "c.json")
    assert f"{found.score:.2%} of the answers right" in said
    assert len(found.cuts) == 3
    assert (found.samples, found.labelled, found.batch) == (200, True, 50)
    assert list((own_cache / "splitnet" / "calibrations").iterdir())
    assert run_command(cli, [*asked, "--batch", "50", "--json"]) == 0
    assert Calibration.from_json(capsys.readouterr().out) == found
    for wrong, message in (
        (["--metric", "perplexity"], "no output is called 'logits'"),
        (["--data", "none.npz"], "there is no file 'none.npz'"),
        (["--codec", "mp3"], "codec 'mp3' is not one of raw"),
        (["--answers", "nonsense"], "no output 'nonsense'"),
    ):
        assert run_command(cli, [*asked, *wrong]) == 2
        assert message in capsys.readouterr().err

"""A plan and its shards in one file: what comes out is what went in, and whatever was changed on the way is refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import Split

import splitnet
from nodes.testing import LocalCluster
from splitnet.bundle import open_bundle, write_bundle
from splitnet.commands.deploying import bundle, deploy
from splitnet.errors import BadPlan, BadShard, SplitnetError

Make = Callable[[int, str], Split]


@pytest.fixture(scope="module")
def file(made: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    one = made(1, "ab")
    return write_bundle(one.plan, one.shards, tmp_path_factory.mktemp("stick") / "model.splitnet", signatures={"x": "y"})


def changed(file: Path, target: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    change(contents)
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return target


def test_what_comes_out_is_what_went_in(file: Path, made: Make, tmp_path: Path) -> None:
    one = made(1, "ab")
    with open_bundle(file) as opened:
        assert opened.plan == one.plan
        assert {stage: shard.sha256 for stage, shard in opened.shards.items()} == {s: shard.sha256 for s, shard in one.shards.items()}
        assert opened.signatures == {"x": "y"}
        folder = next(iter(opened.shards.values())).path.parent
        assert folder.is_dir()
    assert not folder.exists()
    again = write_bundle(one.plan, one.shards, tmp_path / "again", signatures={"x": "y"})
    assert again.read_bytes() == file.read_bytes()


def test_a_plan_of_other_shards_is_not_bundled(made: Make, tmp_path: Path) -> None:
    with pytest.raises(BadPlan):
        write_bundle(made(1, "ab").plan, made(2, "ab").shards, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def _index(change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def act(contents: dict[str, bytes]) -> None:
        index = json.loads(contents["bundle.json"])
        change(index)
        contents["bundle.json"] = json.dumps(index).encode()

    return act


WEIGHTS = "shards/stage0/weights.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update({WEIGHTS: c[WEIGHTS][:-1] + bytes([c[WEIGHTS][-1] ^ 1])}), "weights.safetensors: wrong sha256"),
        (lambda c: c.update({"plan.json": c["plan.json"].replace(b"latency", b"latencz", 1)}), "plan.json: wrong sha256"),
        (lambda c: c.pop(WEIGHTS), "'shards/stage0/weights.safetensors' is missing"),
        (lambda c: c.update({"more": b"x"}), "'more' is not named in bundle.json"),
        (lambda c: c.update({WEIGHTS: c[WEIGHTS] + b"x"}), "bytes, bundle.json says"),
        (_index(lambda i: i.update(version=2)), "has version 2"),
        (_index(lambda i: i.update(format="zip")), "does not say 'splitnet-bundle'"),
        (_index(lambda i: i["members"].update({"../../x": i["members"]["plan.json"]})), "is no member of a bundle"),
        (_index(lambda i: i["members"].update({"shards/../x": i["members"]["plan.json"]})), "is no member of a bundle"),
        (_index(lambda i: i["members"]["plan.json"].update(size_bytes=1 << 50)), "at most"),
        (_index(lambda i: i["members"][WEIGHTS].update(size_bytes=1 << 50)), "the file has"),
        (_index(lambda i: i["members"][WEIGHTS].update(size_bytes=-1)), "is no member of a bundle"),
        (_index(lambda i: i.update(members=[])), "names no plan.json"),
        (_index(lambda i: i.update(signatures=3)), "signatures"),
        (lambda c: c.update({"bundle.json": b"[" * 100_000}), "not a bundle"),
        (lambda c: c.update({"bundle.json": b"{"}), "cannot be read"),
    ],
)
def test_a_changed_bundle_is_refused(file: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], None], message: str) -> None:
    with pytest.raises(BadShard, match=message), open_bundle(changed(file, tmp_path / "x", change)):
        pass


def test_a_compressed_bundle_is_refused(file: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(BadShard, match="not stored as it is"),
        open_bundle(changed(file, tmp_path / "x", lambda _: None, zipfile.ZIP_DEFLATED)),
    ):
        pass


def test_no_bundle_at_all(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    for name, message in (("text", "not a bundle"), ("empty", "not a bundle"), ("none", "No such file")):
        with pytest.raises(BadShard, match=message), open_bundle(tmp_path / name):
            pass


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_a_bundle_that_was_damaged_anywhere_is_refused_or_the_same(file: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content)
    refused = None
    try:
        with open_bundle(damaged) as opened, open_bundle(file) as whole:
            assert opened.plan == whole.plan
            assert {s: shard.sha256 for s, shard in opened.shards.items()} == {s: shard.sha256 for s, shard in whole.shards.items()}
    except SplitnetError as error:
        refused = error
    assert refused is None or refused.remedy


def test_from_a_stick(cluster: LocalCluster, made: Make, name: str, saved: Callable[[Split, str], Path], tmp_path: Path) -> None:
    for number in (1, 2):
        written = CliRunner().invoke(bundle, [str(saved(made(number, "ab"), str(number))), "-o", str(tmp_path / f"{number}.splitnet")])
        assert written.exit_code == 0, written.output
        assert "2 stages of chain" in written.output
    first = CliRunner().invoke(deploy, ["--bundle", str(tmp_path / "1.splitnet"), "--name", name])
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(deploy, ["--bundle", str(tmp_path / "2.splitnet"), "--name", name, "--update", "--json"])
    assert json.loads(second.output)["generation"] == 2
    two = made(2, "ab")
    with splitnet.Client(two.address, name) as client:
        assert np.array_equal(client.infer(two.inputs(1))["output"], two.whole(two.inputs(1))["output"])
    assert CliRunner().invoke(deploy, ["plan.json", "--bundle", "x"]).exit_code == 2

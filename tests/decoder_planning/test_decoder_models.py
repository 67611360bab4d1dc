"""Reading decoder models from disk, and cutting them into shards."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import save_tiny

from nodes.engines.decoder.engine import DecoderEngine
from nodes.engines.decoder.steps import Step
from partitioner.decoders.model import DecoderModel, load_decoder
from partitioner.decoders.writing import write_span
from splitnet.decoder_weights import dequantize, plain_name
from splitnet.errors import BadModel
from splitnet.shard import Shard, open_shard, read_header


def cut(model: DecoderModel, folder: Path, a: int, b: int, form: str = "float32", dtype: str = "float32") -> Shard:
    spec = model.spec(a, b, form=form, dtype=dtype, context_length=64)
    write_span(model, spec, (a, b), form, folder, "stage", 0)
    return open_shard(folder)


def stored(shard: Shard) -> dict[str, torch.Tensor]:
    return {name: tensor for path in shard.weights for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_neox", "gemma3_text", "phi3"])
def test_stages_hold_exactly_the_models_tensors(tmp_path: Path, model_type: str) -> None:
    model = load_decoder(str(save_tiny(tmp_path / "model", model_type)))
    count = len(model.vertices)
    found: dict[str, torch.Tensor] = {}
    for a, b in ((0, 2), (2, 4), (4, count)):
        part = stored(cut(model, tmp_path / f"{a}", a, b))
        assert not set(found) & set(part)
        found |= part
    if model.tied:
        assert torch.equal(found.pop("lm_head.weight"), found[model.embedding_matrix])
    assert set(found) == set(model.checkpoint.places)
    for name, tensor in found.items():
        assert np.array_equal(tensor.numpy(), model.checkpoint.read(name)), name


def test_a_model_in_several_files_with_one_matrix_at_both_ends(tied: DecoderModel, tmp_path: Path) -> None:
    assert (tied.checkpoint.folder / "model.safetensors.index.json").is_file()
    count = len(tied.vertices)
    whole = cut(tied, tmp_path / "whole", 0, count, "bfloat16", "bfloat16")
    assert "lm_head.weight" not in stored(whole)
    assert whole.manifest.param_bytes == sum(t.nbytes for t in stored(whole).values())
    last = cut(tied, tmp_path / "last", 3, count, "bfloat16", "bfloat16")
    assert torch.equal(stored(last)["lm_head.weight"], stored(whole)[tied.embedding_matrix])


@pytest.mark.parametrize(("form", "dtype"), [("bfloat16", "bfloat16"), ("int8", "float32"), ("int4", "bfloat16")])
def test_weights_are_stored_in_the_format_that_is_asked_for(llama: DecoderModel, tmp_path: Path, form: str, dtype: str) -> None:
    shard = cut(llama, tmp_path / "stage", 1, 3, form, dtype)
    arrays = {
        name: (t.view(torch.int16).numpy().view("uint16") if t.dtype == torch.bfloat16 else t.numpy()) for name, t in stored(shard).items()
    }
    names = {plain_name(name) for name in arrays}
    assert names == {name for vertex in llama.vertices[1:3] for name in llama.tensors[vertex]}
    assert shard.manifest.param_bytes == sum(a.nbytes for a in arrays.values())
    matrix = "model.layers.0.mlp.up_proj.weight"
    if form == "int8":
        back = dequantize(matrix, arrays)
        worst = np.abs(back - llama.checkpoint.read(matrix)).max()
        assert 0 < worst <= np.abs(llama.checkpoint.read(matrix)).max() / 200
    assert f"{matrix}.{form}" in arrays or form == "bfloat16"


def test_the_engine_runs_stages_as_it_runs_the_whole(llama: DecoderModel, tmp_path: Path) -> None:
    count = len(llama.vertices)
    ids = np.array([5, 9, 60, 3], np.int32)
    whole = DecoderEngine.load(cut(llama, tmp_path / "whole", 0, count), threads=1, cache_tokens=16)
    expected = whole.step([Step(1, 0, ids, wanted=4)], None)
    hidden = None
    for a, b in ((0, 3), (3, count)):
        stage = DecoderEngine.load(cut(llama, tmp_path / f"{a}", a, b), threads=1, cache_tokens=16)
        hidden = stage.step([Step(1, 0, ids, wanted=4 if b == count else 0)], hidden)
        assert stage.memory_bytes() == llama.param_bytes(a, b, "float32", "float32")
        assert stage.cache_bytes() == 16 * llama.kv_bytes(a, b, "float32")
    assert np.array_equal(hidden, expected)


def test_the_hash_does_not_depend_on_how_tensors_are_divided_among_files(llama: DecoderModel, tmp_path: Path) -> None:
    again = load_decoder(str(save_tiny(tmp_path / "again", shard="100KB")))
    assert again.sha256 == llama.sha256
    tensors = load_file(llama.checkpoint.folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    folder = tmp_path / "other"
    shutil.copytree(llama.checkpoint.folder, folder)
    save_file(tensors, folder / "model.safetensors")
    assert load_decoder(str(folder)).sha256 != llama.sha256


def test_a_repository_of_the_hub_is_read_from_its_cache(llama: DecoderModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub lays it out: blobs by their hash, and a snapshot of links to them. Nothing is fetched (`HF_HUB_OFFLINE`, conftest.py)."""
    repository, revision = tmp_path / "models--acme--tiny", "0" * 40
    for folder in (repository / "blobs", repository / "refs", repository / "snapshots" / revision):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for path in save_tiny(tmp_path / "source", shard="100KB").iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (repository / "snapshots" / revision / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = load_decoder("acme/tiny")
    assert len({place.file for place in found.checkpoint.places.values()}) > 2
    assert (found.name, found.sha256) == ("acme/tiny", llama.sha256)
    whole = cut(found, tmp_path / "whole", 0, len(found.vertices))
    assert set(stored(whole)) == set(found.checkpoint.places)
    with pytest.raises(BadModel, match="hf:acme/other: cannot fetch it: LocalEntryNotFoundError"):
        load_decoder("acme/other")
    (repository / "snapshots" / revision / "model-00002-of-00008.safetensors").unlink()
    with pytest.raises(BadModel, match="names 'model-00002-of-00008.safetensors', which is missing"):
        load_decoder("acme/tiny")


# ----------------------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def folder(llama: DecoderModel, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return shutil.copytree(llama.checkpoint.folder, tmp_path / "spoilt")


def edit_config(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_an_architecture_that_is_not_supported_is_named_with_the_list(folder: Path) -> None:
    edit_config(folder, model_type="bert")
    with pytest.raises(BadModel, match=r"'bert' is not supported for generation; splitnet runs gemma2, .*llama.*starcoder2"):
        load_decoder(str(folder))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadModel, match=r"tensor 'model\.layers\.2\.mlp\.up_proj\.weight' is missing"):
        load_decoder(str(folder))


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    with pytest.raises(BadModel, match=r"'model\.layers\.0\.mlp\.\w+\.weight' has the shape .*, the config says"):
        load_decoder(str(folder))


def test_an_index_that_names_what_is_not_there(tied: DecoderModel, tmp_path: Path) -> None:
    folder = shutil.copytree(tied.checkpoint.folder, tmp_path / "indexed")
    missing = sorted(folder.glob("model-*.safetensors"))[0]
    moved = read_header(missing)
    missing.unlink()
    with pytest.raises(BadModel, match=rf"names '{missing.name}', which is missing"):
        load_decoder(str(folder))
    save_file({"other": torch.zeros(1)}, missing)
    with pytest.raises(BadModel, match="index.json says that it is there"):
        load_decoder(str(folder))
    assert moved
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(BadModel, match="is no file of this folder"):
        load_decoder(str(folder))


def test_directories_without_what_is_needed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="there is no directory"):
        load_decoder(str(tmp_path / "nowhere"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadModel, match=r"no \*\.safetensors; pytorch_model\.bin is a pickle"):
        load_decoder(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(BadModel, match="has no config.json"):
        load_decoder(str(folder))

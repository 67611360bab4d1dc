"""Lines of text, through the tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from partitioner.calibration import Calibration
from partitioner.samples import load_samples
from partitioner.sources import load_model
from splitnet.cli import cli, run_command
from splitnet.errors import BadInput

LINES = ["one two three", "two", "", "three two one one two three", "one unheard word", "two two"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights and a tokenizer of whole words."""
    import tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf") / "tiny"
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "one", "two", "three", "word"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=5)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=6, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=8
    )
    BertModel(config).save_pretrained(str(folder))
    (folder.parent / "lines.txt").write_text("\n".join(LINES) + "\n")
    return folder


def test_each_line_is_a_sample(directory: Path) -> None:
    structure = load_model(f"hf:{directory}").structure
    lines = directory.parent / "lines.txt"
    found = load_samples(lines, structure, f"hf:{directory}", batch=2)
    assert found.count == 5  # an empty line is none
    assert not found.labelled
    assert found.batches[0].inputs["input_ids"].tolist() == [[2, 3, 4], [3, 0, 0]]
    assert found.batches[0].inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found.batches[1].inputs["input_ids"].shape == (2, 5)  # cut to what the tokenizer says
    assert found.batches[1].inputs["input_ids"].dtype == np.int64
    with pytest.raises(BadInput, match="needs a model with a tokenizer"):
        load_samples(lines, structure, "model.pt2")
    (directory.parent / "blank.txt").write_text("\n\n")
    with pytest.raises(BadInput, match="there is no sample in it"):
        load_samples(directory.parent / "blank.txt", structure, f"hf:{directory}")


def test_a_text_model_is_calibrated(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = ["calibrate", f"hf:{directory}", "--data", str(directory.parent / "lines.txt"), "--metric", "cosine", "--cuts", "4"]
    assert run_command(cli, [*asked, "--codec", "bf16", "--codec", "int4", "--json"]) == 0
    found = Calibration.from_json(capsys.readouterr().out)
    assert (found.output, found.samples, len(found.cuts)) == ("last_hidden_state", 5, 4)
    *inside, pooler = found.cuts
    for cut in inside:
        assert abs(cut.codecs["bf16"].loss) < 1e-4
        assert cut.codecs["bf16"].loss < cut.codecs["int4"].loss < 0.1
    assert pooler.codecs["int4"].loss == 0.0  # behind the output that is judged
    assert run_command(cli, [*asked[:4], "--metric", "perplexity"]) == 2
    assert "a model by hf: has no head" in capsys.readouterr().err

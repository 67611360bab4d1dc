"""The demo's language model in its tiny form: trained, saved, found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from partitioner.demo.llm.corpus import documents, fingerprint, paragraphs
from partitioner.demo.llm.training import TINY, Progress, trained_model


def test_it_is_an_ordinary_directory(trained: Path, told: list[Progress]) -> None:
    assert [progress.step for progress in told] == list(range(1, TINY.steps + 1))
    assert told[-1].loss < told[0].loss
    config = json.loads((trained / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["vocab_size"]) == ("llama", TINY.layers, TINY.vocabulary)
    assert {path.name for path in trained.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_transformers_and_the_gateway_read_its_tokenizer_alike(trained: Path) -> None:
    from transformers import AutoTokenizer

    from splitnet.gateway.tokenizing import TextTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(trained), TextTokenizer(trained)
    text = "If the file does not exist, naïve 日本."
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode(text)[0] == 0
    assert ours.decode(ours.encode(text)) == text


def test_it_is_trained_once(trained: Path) -> None:
    def never(progress: Progress) -> None:
        raise AssertionError("it was trained already")

    assert trained_model(TINY, trained.parent, never) == trained
    with pytest.raises(AssertionError, match="trained already"):
        trained_model(replace(TINY, seed=8), trained.parent, never)
    assert [path.name for path in trained.parent.iterdir()] == [trained.name], "an interrupted training leaves nothing"


def test_its_text_is_prose_and_always_the_same() -> None:
    texts = documents(10_000)
    assert fingerprint(texts) == fingerprint(documents(10_000))
    assert 10_000 <= sum(map(len, texts)) < 100_000
    found = [part for text in texts for part in text.split("\n\n")]
    assert len(set(found)) == len(found)
    assert all(len(part) >= 80 and part[0].isupper() for part in found)


def test_code_lists_and_headings_are_left_out() -> None:
    text = """Heading
*******

This is a paragraph of prose that goes on
over two lines, and is long enough to be kept.

   This one is indented code, which is not prose, however long it may be, and so it is not kept.

* this is a list, which is long enough to be kept, were it not for its form,
* and it has two points.

Grammar := ( "x" | "y" )* [ "z" ] ; 12345 67890 !!! ??? {} [] () <> == != += -= *= /= %= &= |= ^= >>= <<=.
"""
    assert list(paragraphs(text)) == ["This is a paragraph of prose that goes on over two lines, and is long enough to be kept."]

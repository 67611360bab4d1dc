from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from splitnet.gateway.decoding import StopWatch, TextStream
from splitnet.gateway.tokenizing import TextTokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def _streamed(stream: TextStream, tokens: list[int]) -> tuple[list[str], str]:
    pieces = [stream.add(token) for token in tokens]
    return pieces, stream.end()


@given(st.text(max_size=40))
def test_pieces_are_the_text_and_no_half_characters(text_tokenizer: TextTokenizer, text: str) -> None:
    ids = text_tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    pieces, rest = _streamed(text_tokenizer.stream(), ids)
    assert "".join(pieces) + rest == text_tokenizer.decode(ids)
    if UNKNOWN not in text:
        assert not any(UNKNOWN in piece for piece in pieces)
        assert rest == ""


@given(st.lists(st.integers(0, 319), max_size=60), st.lists(st.integers(0, 319), max_size=5))
def test_any_tokens_give_what_they_give_together(text_tokenizer: TextTokenizer, tokens: list[int], before: list[int]) -> None:
    """Bytes that are no text included: what is told is what all tokens together make."""
    pieces, rest = _streamed(text_tokenizer.stream(), tokens)
    assert "".join(pieces) + rest == text_tokenizer.decode(tokens)
    pieces, rest = _streamed(text_tokenizer.stream(before), tokens)
    assert len("".join(pieces) + rest) <= len(text_tokenizer.decode([*before, *tokens]))


def test_a_character_that_the_prompt_began_is_completed(text_tokenizer: TextTokenizer) -> None:
    ids = text_tokenizer._tokenizer.encode("語", add_special_tokens=False).ids
    assert len(ids) > 1
    pieces, rest = _streamed(text_tokenizer.stream(ids[:1]), ids[1:])
    assert "".join(pieces) + rest == "語"


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As SentencePiece's models have it: a word begins with ▁, and an unknown character is its bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁Hello": 256, "▁world": 257, "s": 258, "<unk>": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def test_spaces_and_bytes_of_sentencepiece(byte_fallback: Tokenizer) -> None:
    ids = [256, 257, 258, *"日本".encode(), 257, *"🙂".encode()]
    pieces, rest = _streamed(TextStream(byte_fallback.decode), ids)
    assert pieces == ["Hello", " world", "s", "", "", "日", "", "", "本", " world", "", "", "", "🙂"]
    assert rest == ""
    pieces, rest = _streamed(TextStream(byte_fallback.decode, [256]), [257])
    assert "".join(pieces) == " world", "after a prompt, a word keeps its space"


def test_bytes_that_never_become_a_character_are_told_in_the_end(byte_fallback: Tokenizer) -> None:
    stream = TextStream(byte_fallback.decode)
    told = [stream.add(0x80) for _ in range(200)]
    assert any(told[:40]), "what is held is bounded"
    assert len("".join(told) + stream.end()) == 200


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.data())
def test_a_text_ends_before_the_first_stop_sequence(text: str, stops: list[str], data: st.DataObject) -> None:
    watch, told, left = StopWatch(stops), "", text
    while left:
        size = data.draw(st.integers(1, len(left)))
        told += watch.add(left[:size])
        left = left[size:]
        assert not any(stop in told for stop in stops)
        assert text.startswith(told)
    told += watch.end()
    _, at = min(((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text), default=(0, len(text)))
    assert told == text[:at]
    assert bool(watch.found) == any(stop in text for stop in stops)


def test_nothing_is_held_back_that_begins_no_sequence() -> None:
    watch = StopWatch(["\n\n", "User:"])
    assert [watch.add(part) for part in ("abc", " U", "sual", "\n", "x", "Us", "er:", "more")] == [
        "abc",
        " ",
        "Usual",
        "",
        "\nx",
        "",
        "",
        "",
    ]
    assert watch.found == "User:"


def test_what_stands_in_the_directory_is_checked(tmp_path: Path, tokenizer_directory: Path) -> None:
    from splitnet.errors import BadModel

    with pytest.raises(BadModel, match=r"tokenizer\.json.*No such file"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadModel, match="is no tokenizer"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{% for %}"}')
    with pytest.raises(BadModel, match="the chat template is not one"):
        TextTokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert TextTokenizer(tmp_path).template is not None, "the file goes before the field"

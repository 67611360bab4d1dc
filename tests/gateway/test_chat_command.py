"""`splitnet chat` over the scripted model, as somebody types."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_model import Script, make_tokenizer

from splitnet.commands.chat import _talk
from splitnet.errors import BadInput, NodeUnavailable
from splitnet.gateway.answering import ServedModel
from splitnet.gateway.conversation import Conversation, Style
from splitnet.gateway.tokenizing import TextTokenizer
from splitnet.generation import TextModel


@pytest.fixture
def script(text_tokenizer: TextTokenizer) -> Script:
    script = Script(text_tokenizer)
    script.says("Yes.")
    return script


def conversation(script: Script, context: int = 200, system: str = "") -> Conversation:
    model = ServedModel("hut", script, TextModel(context, 320, 4 * context, (2,)), script.tokenizer, 0)
    return Conversation(model, Style(max_tokens=30), system)


def typing(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    class Typed:
        def __init__(self) -> None:
            self._lines: Iterator[str] = iter(lines)

        def isatty(self) -> bool:
            return False

        def readline(self) -> str:
            return next(self._lines, "")

    monkeypatch.setattr("sys.stdin", Typed())


def test_what_was_said_is_remembered_until_reset(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = conversation(script, system="Be brief.")
    typing(monkeypatch, ["Hello\n", "\n", "Again\n", "/what\n", "/reset\n", "New\n"])
    _talk(talk)
    assert capsys.readouterr().out == "Yes.\nYes.\nYes.\n"
    assert [(m["role"], m["content"]) for m in talk.messages] == [("system", "Be brief."), ("user", "New"), ("assistant", "Yes.")]
    prompts = [script.tokenizer.decode(call["input_ids"]) for call in script.calls]
    assert prompts[1] == "system\nBe brief.\nuser\nHello\nassistant\nYes.\nuser\nAgain\nassistant\n"
    assert prompts[2] == "system\nBe brief.\nuser\nNew\nassistant\n"


def test_ctrl_c_stops_the_answer_and_keeps_what_came(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.says("Yes, and very much so.")
    talk = conversation(script)
    echo: Any = __import__("click").echo
    shown: list[str] = []

    def interrupt_at_the_third(text: str = "", **options: Any) -> None:
        echo(text, **options)
        shown.append(text)
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("splitnet.commands.chat.click.echo", interrupt_at_the_third)
    typing(monkeypatch, ["Hello\n"])
    _talk(talk)
    assert "[stopped]" in capsys.readouterr().out
    assert script.given[0].closed
    said = talk.messages[-1]
    assert said["role"] == "assistant"
    assert said["content"]
    assert "Yes, and very much so.".startswith(said["content"])


def test_an_error_is_told_and_the_question_taken_back(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = conversation(script)
    script.error = NodeUnavailable("node b is away")
    typing(monkeypatch, ["Hello\n"])
    _talk(talk)
    assert "node b is away" in capsys.readouterr().err
    assert talk.messages == ()


def test_what_no_longer_fits_is_forgotten_from_the_beginning(script: Script) -> None:
    talk = conversation(script, context=120, system="S")
    forgotten = 0
    for number in range(6):
        forgotten += talk.ask(f"Question {number}")
        assert "".join(talk.answer()) == "Yes."
    assert forgotten >= 2
    assert talk.messages[0]["role"] == "system"
    assert talk.messages[1]["role"] == "user"
    assert talk.messages[-2]["content"] == "Question 5"
    with pytest.raises(BadInput, match="leave room for an answer"):
        talk.ask("word " * 200)
    assert talk.messages[-1]["role"] == "assistant", "what was too long is not kept"


def test_a_model_without_a_template_does_not_converse(tmp_path: Path) -> None:
    script = Script(TextTokenizer(make_tokenizer(tmp_path / "plain", template=None)))
    with pytest.raises(BadInput, match="splitnet generate"):
        conversation(script)

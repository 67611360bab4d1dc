"""A model's tokenizer, from the files that come with it: tokenizer.json, tokenizer_config.json, chat_template.jinja.

`tokenizers` alone, without transformers: the same compiled code, and a gateway stays as small as the box that it runs on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from splitnet.errors import BadInput, BadModel
from splitnet.gateway.decoding import TextStream
from splitnet.gateway.templates import ChatTemplate

__all__ = ["TextTokenizer"]

_MARK, _UNMARK = "\ue000", "\ue001"  # private use: around what a user wrote that looks like a special token
_LARGEST_FILE = 256 << 20


class TextTokenizer:
    """Text to tokens and back. Any number of threads may use one."""

    def __init__(self, directory: str | Path, chat_template: Path | None = None) -> None:
        """Raises BadModel that names the file which is missing or malformed."""
        from tokenizers import Tokenizer

        self.directory = Path(directory)
        text = _read(self.directory / "tokenizer.json", "save the model's tokenizer there, or name another directory with --tokenizer")
        try:
            self._tokenizer: Any = Tokenizer.from_str(text)
            self._plain: Any = Tokenizer.from_str(text)  # takes special tokens for plain text
        except Exception as error:  # noqa: BLE001 - what tokenizers raises is Exception itself
            raise BadModel(f"{self.directory / 'tokenizer.json'} is no tokenizer: {error}") from None
        for each in (self._tokenizer, self._plain):
            each.no_padding()
            each.no_truncation()
        self._plain.encode_special_tokens = True
        self._special = sorted(
            (token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special), key=len, reverse=True
        )
        config = _config(self.directory / "tokenizer_config.json")
        self.template = self._find_template(config, chat_template)

    @property
    def vocabulary(self) -> int:
        """Ids are below it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """A text to be continued, with what the tokenizer puts before it (a bos token). Special tokens in it are special tokens."""
        return list(self._tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages to be answered, by the chat template. What looks like a special token in a message is plain text: nobody ends his turn, or speaks as
        the system, by writing so. Raises BadInput where there is no template."""
        if self.template is None:
            raise BadInput(
                f"messages: the model has no chat template (neither chat_template.jinja nor tokenizer_config.json in {self.directory.name!r} has one)",
                remedy="use /v1/completions, or give a template: --chat-template FILE",
            )
        if not self._special:
            return list(self._tokenizer.encode(self.template.render(messages), add_special_tokens=False).ids)
        special = "|".join(map(re.escape, self._special))
        marked = [{key: self._mark(special, value) for key, value in message.items()} for message in messages]
        pieces = re.split(f"{_MARK}({special}){_UNMARK}|[{_MARK}{_UNMARK}]", self.template.render(marked))
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if piece:
                ids += self._piece(self._plain if number % 2 else self._tokenizer, piece, first=number == 0)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Without special tokens. An id beyond the vocabulary (models pad theirs) gives no text."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        return TextStream(self.decode, before)

    @staticmethod
    def _mark(special: str, text: str) -> str:
        text = text.replace(_MARK, "").replace(_UNMARK, "")
        return re.sub(special, f"{_MARK}\\g<0>{_UNMARK}", text)

    @staticmethod
    def _piece(tokenizer: Any, text: str, first: bool) -> list[int]:
        """After a line break, where it is not the first: tokenizers like SentencePiece's put a space before what they take for a beginning."""
        if first:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        lead = tokenizer.encode("\n", add_special_tokens=False).ids
        ids = tokenizer.encode("\n" + text, add_special_tokens=False).ids
        return list(ids[len(lead) :] if ids[: len(lead)] == lead else tokenizer.encode(text, add_special_tokens=False).ids)

    def _find_template(self, config: Mapping[str, Any], given: Path | None) -> ChatTemplate | None:
        source: Any = config.get("chat_template")
        own = self.directory / "chat_template.jinja"
        if given is not None or own.is_file():
            source = _read(given or own, "correct --chat-template")
        elif isinstance(source, list):  # several, by name
            source = next((each.get("template") for each in source if isinstance(each, dict) and each.get("name") == "default"), None)
        if source is None:
            return None
        if not isinstance(source, str):
            raise BadModel(f"{self.directory / 'tokenizer_config.json'}: chat_template is {type(source).__name__}, expected a text")
        special = {name: content for name in config if name.endswith("_token") and (content := _content(config[name]))}
        return ChatTemplate(source, special)


def _content(token: Any) -> str:
    """A special token is given as a text, or as an object that has it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read(path, ""))
    except (ValueError, RecursionError) as error:
        raise BadModel(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise BadModel(f"{path} is not a JSON object")
    return config


def _read(path: Path, remedy: str) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise BadModel(f"{path} has {path.stat().st_size} bytes; at most {_LARGEST_FILE} are read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadModel(f"{path}: {error.strerror}", remedy=remedy) from None
    except UnicodeDecodeError as error:
        raise BadModel(f"{path} is not UTF-8: {error}") from None

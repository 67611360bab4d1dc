"""A gateway on a free port, over a real tokenizer and a generator that says what a test wants it to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from splitnet import background
from splitnet.errors import SplitnetError
from splitnet.gateway.answering import ServedModel
from splitnet.gateway.asgi import Limits
from splitnet.gateway.keys import KeyFile
from splitnet.gateway.running import gateway_for
from splitnet.gateway.server import GatewayConfig
from splitnet.gateway.tokenizing import TextTokenizer
from splitnet.generation import TextModel

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = ["The hut stands above the valley, and nobody lives in it now.", "Ein Bär im Café: żółć, 日本語, 🙂 and naïve words."] * 4


def make_tokenizer(directory: Path, template: str | None = CHATML) -> Path:
    """Byte-level BPE of 320 tokens, so that most characters beyond ASCII take several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|end|>", "eos_token": {"content": "<|im_end|>"}, **({"chat_template": template} if template else {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


class ScriptedTokens:
    """The tokens of one call. Each waits for the script's gate."""

    def __init__(self, script: Script, tokens: Sequence[int]) -> None:
        self.finish, self.cached_tokens = "", 3
        self.closed = False
        self._script = script
        self._tokens = list(tokens)

    def __aiter__(self) -> AsyncIterator[int]:
        return self._walk()

    async def _walk(self) -> AsyncIterator[int]:
        for at, token in enumerate(self._tokens):
            if at == self._script.fails_at and self._script.error is not None:
                raise self._script.error
            if at >= self._script.hangs_at:
                await asyncio.sleep(60)
            await asyncio.sleep(0)
            yield token

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class Script:
    """What the model says next, and what was asked of it. Of what it says, `max_new_tokens` come."""

    tokenizer: TextTokenizer
    ids: list[int] = field(default_factory=list)
    error: SplitnetError | None = None
    fails_at: int = 0
    hangs_at: int = 1 << 30
    calls: list[dict[str, Any]] = field(default_factory=list)
    given: list[ScriptedTokens] = field(default_factory=list)

    def says(self, text: str, end: bool = True) -> list[int]:
        self.ids = self.tokenizer._tokenizer.encode(text, add_special_tokens=False).ids + ([2] if end else [])
        return self.ids

    def generate(
        self, input_ids: Sequence[int], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
        repetition_penalty: float = 1.0, seed: int | None = None, *, timeout_s: float | None = None,
    ) -> ScriptedTokens:  # fmt: skip
        self.calls.append(
            {
                "input_ids": list(input_ids), "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
                "repetition_penalty": repetition_penalty, "seed": seed, "timeout_s": timeout_s,
            }
        )  # fmt: skip
        tokens = ScriptedTokens(self, self.ids[:max_new_tokens])
        self.given.append(tokens)
        return tokens


@dataclass
class Running:
    """A gateway that serves `script` as model "hut"."""

    url: str
    script: Script
    log: list[tuple[str, str, int, float]]
    away: list[SplitnetError]
    clients: dict[str, openai.OpenAI] = field(default_factory=dict)

    def client(self, key: str = "none") -> openai.OpenAI:
        if key not in self.clients:
            self.clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)
        return self.clients[key]


class Started:
    """Blocking: in the background loop."""

    def __init__(self, tokenizer: TextTokenizer, *, keys: KeyFile | None = None, limits: Limits | None = None, context: int = 256) -> None:
        script = Script(tokenizer)
        model = ServedModel("hut", script, TextModel(context, 320, 4 * context, (2,)), tokenizer, 1_700_000_000)
        log: list[tuple[str, str, int, float]] = []
        away: list[SplitnetError] = []

        async def ready(_: ServedModel) -> None:
            for error in away:
                raise error

        config = GatewayConfig("127.0.0.1:0", keys is not None, drain_s=1)
        self._server = gateway_for((model,), keys, limits or Limits(), config, ready, lambda *line: log.append(line))
        background.run(self._enter())
        self.running = Running(self._server.url, script, log, away)

    async def _enter(self) -> None:
        await self._server.__aenter__()

    def stop(self) -> None:
        for client in self.running.clients.values():
            client.close()
        background.run(self._server.__aexit__())

"""Gateways and a tokenizer for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_model import Running, Started, make_tokenizer

from splitnet.gateway.tokenizing import TextTokenizer


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("gateway") / "hut")


@pytest.fixture(scope="session")
def text_tokenizer(tokenizer_directory: Path) -> TextTokenizer:
    return TextTokenizer(tokenizer_directory)


@pytest.fixture(scope="module")
def _shared(text_tokenizer: TextTokenizer) -> Iterator[Running]:
    started = Started(text_tokenizer)
    yield started.running
    started.stop()


@pytest.fixture
def gateway(_shared: Running) -> Running:
    """One server for a module's tests; each begins with a fresh script."""
    script = _shared.script
    script.error, script.fails_at, script.hangs_at = None, 0, 1 << 30
    script.calls.clear()
    script.given.clear()
    _shared.log.clear()
    _shared.away.clear()
    script.says("The hut stands above the valley.")
    return _shared


@pytest.fixture
def start(text_tokenizer: TextTokenizer) -> Iterator[Any]:
    """Starts gateways of a test's own."""
    started: list[Started] = []

    def begin(**options: Any) -> Running:
        started.append(Started(text_tokenizer, **options))
        started[-1].running.script.says("The hut stands above the valley.")
        return started[-1].running

    yield begin
    for each in started:
        each.stop()

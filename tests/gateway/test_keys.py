from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import openai
import pytest

from splitnet.cli import run_command
from splitnet.commands.gateway import keys
from splitnet.errors import AlreadyExists, BadInput, NotFound, NotPermitted
from splitnet.gateway.keys import KeyFile
from splitnet.gateway.server import GatewayConfig


@pytest.fixture
def key_file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "config" / "keys.json")


def test_a_key_is_kept_as_a_hash_that_only_its_owner_may_read(key_file: KeyFile) -> None:
    key = key_file.create("laptop")
    text = key_file.path.read_text()
    assert key not in text
    assert key.removeprefix("sk-splitnet-") not in text
    assert key_file.path.stat().st_mode & 0o777 == 0o600
    assert key_file.path.parent.stat().st_mode & 0o777 == 0o700
    assert key_file.owner(key) == "laptop"
    assert [key_file.owner(wrong) for wrong in ("", key[:-1], key + "x", key.upper(), "ключ", "\udcff")] == [None] * 6


def test_keys_come_and_go_while_a_gateway_reads_them(key_file: KeyFile) -> None:
    first = key_file.create("a")
    reader = KeyFile(key_file.path)
    assert reader.owner(first) == "a"
    second = key_file.create("b")
    assert (reader.owner(first), reader.owner(second)) == ("a", "b")
    key_file.revoke("a")
    assert (reader.owner(first), reader.owner(second)) == (None, "b")


def test_what_cannot_be_is_refused(key_file: KeyFile, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no key file"):
        key_file.keys()
    with pytest.raises(BadInput, match="letters, digits"):
        key_file.create("../x")
    key_file.create("a")
    with pytest.raises(AlreadyExists):
        key_file.create("a")
    with pytest.raises(NotFound, match="it has a"):
        key_file.revoke("b")


@pytest.mark.parametrize("mode", [0o640, 0o602, 0o604])
def test_a_file_that_others_may_read_is_refused(key_file: KeyFile, mode: int) -> None:
    key = key_file.create("a")
    key_file.path.chmod(mode)
    with pytest.raises(NotPermitted, match=f"mode {mode:04o}"):
        key_file.owner(key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 2, "keys": []}',
        '{"version": 1, "keys": [{"name": "a"}]}',
        '{"version": 1, "keys": [{"name": "a", "sha256": "", "created": ""}]}',
    ],
)
def test_a_malformed_file_lets_nobody_in(key_file: KeyFile, text: str) -> None:
    key_file.path.parent.mkdir()
    key_file.path.touch(0o600)
    key_file.path.write_text(text)
    with pytest.raises(BadInput, match=r"keys\.json"):
        key_file.owner("")


def test_the_gateway_asks_for_a_key(start: Any, key_file: KeyFile) -> None:
    key = key_file.create("laptop")
    gateway = start(keys=key_file)
    assert [model.id for model in gateway.client(key).models.list()] == ["hut"]
    for wrong in ("none", key[:-1]):
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key") as caught:
            gateway.client(wrong).completions.create(model="hut", prompt="x")
        assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    key_file.revoke("laptop")
    with pytest.raises(openai.AuthenticationError):
        gateway.client(key).models.list()
    os.chmod(key_file.path, 0o644)
    with pytest.raises(openai.InternalServerError, match="cannot read its API keys"):
        gateway.client(key).models.list()
    assert gateway.script.calls == []


def test_an_open_address_needs_keys_and_encryption() -> None:
    for host in ("0.0.0.0", "[::]", "10.0.0.5", "attic.local"):
        with pytest.raises(NotPermitted, match="nobody needs a key"):
            GatewayConfig(f"{host}:8000")
        with pytest.raises(NotPermitted, match="in the clear"):
            GatewayConfig(f"{host}:8000", keys=True)
        GatewayConfig(f"{host}:8000", keys=True, insecure=True)
    for host in ("127.0.0.1", "[::1]", "localhost"):
        GatewayConfig(f"{host}:8000")
    for wrong in ("8000", "127.0.0.1", "127.0.0.1:x", ":8000", "127.0.0.1:70000"):
        with pytest.raises(BadInput, match="expected HOST:PORT"):
            GatewayConfig(wrong)
    with pytest.raises(BadInput, match="belong together"):
        GatewayConfig(certificate=Path("x"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys.json")
    assert run_command(keys, ["create", "laptop", "--keys", path]) == 0
    key = capsys.readouterr().out.strip()
    assert KeyFile(path).owner(key) == "laptop"
    assert run_command(keys, ["list", "--keys", path, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["name"] == "laptop"
    assert run_command(keys, ["revoke", "laptop", "--keys", path]) == 0
    assert run_command(keys, ["revoke", "laptop", "--keys", path]) == 2
    assert "no key 'laptop'" in capsys.readouterr().err

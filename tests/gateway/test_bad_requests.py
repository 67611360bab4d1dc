"""What is wrong is refused with the status that OpenAI's clients expect, and an error that names the field."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import Running

from splitnet.errors import NodeUnavailable
from splitnet.gateway.asgi import Limits
from splitnet.gateway.errors import ApiError
from splitnet.gateway.fields import parse_json
from splitnet.gateway.requests import read_chat, read_completion

HELLO = [{"role": "user", "content": "Hello"}]
JSON = {"Content-Type": "application/json"}


def ask(
    gateway: Running, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, Any]:
    """Status, headers, and the JSON of the answer."""
    connection = http.client.HTTPConnection(urlsplit(gateway.url).netloc, timeout=10)
    try:
        connection.request(method, path, body.encode() if isinstance(body, str) else body, headers or {})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, answer.headers, json.loads(text) if text else None
    finally:
        connection.close()


COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": ["a", "b"]}, "prompt", "unsupported_value"),
    ({"prompt": []}, "prompt", "empty_array"),
    ({"prompt": [1, "x"]}, "prompt[1]", "invalid_type"),
    ({"prompt": [1, -1]}, "prompt[1]", "invalid_type"),
    ({"prompt": 7}, "prompt", "invalid_type"),
    ({"prompt": [320]}, "prompt", "invalid_value"),
    ({"prompt": "word " * 400}, "prompt", "context_length_exceeded"),
    ({"max_tokens": 256}, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": "9"}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": 10**30}, "max_tokens", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"temperature": 10**400}, "temperature", "invalid_value"),
    ({"top_p": 1.01}, "top_p", "invalid_value"),
    ({"seed": 1.0}, "seed", "invalid_type"),
    ({"top_k": 1 << 40}, "top_k", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "array_above_max_length"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"stop": [1]}, "stop", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what", "unknown_parameter"),
    ({"n": 2}, "n", "unsupported_value"),
    ({"n": True}, "n", "unsupported_value"),
    ({"best_of": 3}, "best_of", "unsupported_value"),
    ({"logprobs": 1}, "logprobs", "unsupported_value"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_value"),
    ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_value"),
    ({"suffix": "end"}, "suffix", "unsupported_value"),
    ({"temprature": 1}, "temprature", "unknown_parameter"),
    ({"model": 5}, "model", "invalid_type"),
    ({"model": None}, "model", "missing_required_parameter"),
]
CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": "Hello"}, "messages", "invalid_type"),
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": ["Hello"]}, "messages[0]", "invalid_type"),
    ({"messages": [*HELLO, {"role": "king", "content": "x"}]}, "messages[1].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "unsupported_value",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood", "unknown_parameter"),
    ({"messages": [{"role": "user", "content": "word " * 400}]}, "messages", "context_length_exceeded"),
    ({"max_completion_tokens": 999}, "max_completion_tokens", "context_length_exceeded"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_value"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
    ({"logprobs": True}, "logprobs", "unsupported_value"),
    ({"prompt": "x"}, "prompt", "unknown_parameter"),
]


@pytest.mark.parametrize(
    ("path", "given_fields", "param", "code"),
    [("/v1/completions", *case) for case in COMPLETION] + [("/v1/chat/completions", *case) for case in CHAT],
)
def test_a_wrong_field_is_named(gateway: Running, path: str, given_fields: dict[str, Any], param: str, code: str) -> None:
    usual = {"model": "hut", "messages": HELLO} if "chat" in path else {"model": "hut", "prompt": "x"}
    status, _, answer = ask(gateway, "POST", path, json.dumps({**usual, **given_fields}), JSON)
    assert (status, answer["error"]["type"], answer["error"]["param"], answer["error"]["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    assert param.split("[")[0].split(".")[0] in answer["error"]["message"] or code == "context_length_exceeded"
    assert gateway.script.calls == []


def test_fields_that_say_nothing_are_taken(gateway: Running) -> None:
    gateway.client().chat.completions.create(
        model="hut", messages=HELLO, n=1, presence_penalty=0, frequency_penalty=0.0, logprobs=False, tools=[], tool_choice="none", user="me",  # type: ignore[arg-type]
        metadata={"a": "b"}, store=False, response_format={"type": "text"}, stop=None, temperature=0, top_p=0,
    )  # fmt: skip
    assert gateway.script.calls[0]["temperature"] == 0
    assert 0 < gateway.script.calls[0]["top_p"] < 1e-6


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "5", '{"model": NaN}', b"\xff\xfe", "{" * 5000, '{"a":' * 100_000, '{"max_tokens": ' + "9" * 5000 + "}"]
)
def test_what_is_no_json_object_is_refused(gateway: Running, body: str | bytes) -> None:
    status, _, answer = ask(gateway, "POST", "/v1/completions", body, JSON)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("half", [b"\\ud800", b"\\uDFff x", b"\xed\xa0\x80"])
def test_half_of_a_surrogate_pair_is_no_text(gateway: Running, half: bytes) -> None:
    """Found by scripts/fuzz.py: the tokenizer's own error came out, as a 500."""
    for path, body in (
        ("/v1/completions", b'{"model": "hut", "prompt": "a %s"}' % half),
        ("/v1/chat/completions", b'{"model": "hut", "messages": [{"role": "user", "content": "%s"}]}' % half),
    ):
        status, _, answer = ask(gateway, "POST", path, body, JSON)
        assert (status, answer["error"]["code"]) == (400, "invalid_json")
    whole = b'{"model": "hut", "prompt": "\\ud83d\\ude42", "max_tokens": 1}'
    assert ask(gateway, "POST", "/v1/completions", whole, JSON)[0] == 200


def test_an_unknown_model_is_404(gateway: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        gateway.client().completions.create(model="palace", prompt="x")
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (404, "model", "model_not_found")
    assert "'hut'" in caught.value.message
    with pytest.raises(openai.NotFoundError, match="palace"):
        gateway.client().models.retrieve("palace")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_paths_and_methods(gateway: Running, method: str, path: str, status: int) -> None:
    got, headers, answer = ask(gateway, method, path)
    assert got == status
    assert answer["error"]["type"] == "invalid_request_error"
    assert path in answer["error"]["message"]
    assert (status == 405) == ("allow" in headers)
    assert headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_web_page_may_send_unasked_is_not_taken(gateway: Running, kind: str) -> None:
    status, _, answer = ask(gateway, "POST", "/v1/completions", json.dumps({"model": "hut", "prompt": "x"}), {"Content-Type": kind})
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
    assert gateway.script.calls == []


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example", 403), ("localhost:1", 200), ("[::1]:8000", 200), ("127.0.0.1.evil.example", 403), ("", 403)]
)
def test_without_keys_only_this_machines_names_are_answered(gateway: Running, host: str, status: int) -> None:
    assert ask(gateway, "GET", "/v1/models", headers={"Host": host})[0] == status


def test_a_body_that_is_too_large_is_413_however_it_comes(start: Any) -> None:
    gateway = start(limits=Limits(max_body_bytes=1000))
    body = json.dumps({"model": "hut", "prompt": "x" * 2000})
    assert ask(gateway, "POST", "/v1/completions", body, JSON)[0] == 413
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:900].encode(), body[900:].encode())) + b"0\r\n\r\n"
    status, _, answer = ask(gateway, "POST", "/v1/completions", chunked, {**JSON, "Transfer-Encoding": "chunked"})
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert ask(gateway, "POST", "/v1/completions", json.dumps({"model": "hut", "prompt": "x"}), JSON)[0] == 200


def test_a_body_that_does_not_come_is_408(start: Any) -> None:
    gateway = start(limits=Limits(body_s=0.1))
    with socket.create_connection((urlsplit(gateway.url).hostname, urlsplit(gateway.url).port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_is_let_go(start: Any) -> None:
    gateway = start(limits=Limits(send_s=0.2), context=1 << 20)
    gateway.script.ids = [5] * (1 << 20)
    with socket.create_connection((urlsplit(gateway.url).hostname, urlsplit(gateway.url).port), timeout=10) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": "hut", "prompt": "x", "max_tokens": 900_000, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 20
        while not (gateway.script.given and gateway.script.given[0].closed):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert gateway.log[0][2] == 499


def test_health_and_readiness(gateway: Running) -> None:
    assert ask(gateway, "GET", "/healthz")[::2] == (200, {"status": "ok"})
    assert ask(gateway, "HEAD", "/healthz")[::2] == (200, None)


def test_readiness_says_which_model_is_away(start: Any) -> None:
    gateway = start()
    gateway.away.append(NodeUnavailable("node a is away"))
    assert ask(gateway, "GET", "/readyz")[::2] == (503, {"status": "unavailable", "models": {"hut": "node a is away"}})
    assert ask(gateway, "GET", "/healthz")[0] == 200
    gateway.away.clear()
    deadline = time.monotonic() + 10
    while ask(gateway, "GET", "/readyz")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ask(gateway, "GET", "/readyz")[2] == {"status": "ready", "models": {"hut": "ready"}}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3) | st.sampled_from(["hut", "user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "max_tokens",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "seed",
        "n",
        "tools",
        "logit_bias",
        "x",
    ]
)


@settings(max_examples=150)
@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_any_object_is_read_or_refused_by_name(values: dict[str, Any]) -> None:
    body = json.dumps(values).encode()
    for read in (read_chat, read_completion):
        try:
            wanted = read(parse_json(body))
        except ApiError as error:
            assert error.status == 400  # noqa: PT017 - either is fine, and each is looked at
            json.dumps(error.body())
        else:
            assert wanted.model == values["model"]

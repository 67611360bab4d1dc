"""The short form of scripts/fuzz.py, and hypothesis on the same decoders."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.generation.orders import decode_orders
from splitnet.errors import ProtocolError, SplitnetError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import fuzz
from fuzzing.targets import Target, targets

NAMES = [
    "audit", "bundle", "certificate", "cluster", "codec", "decoder", "frame", "graph", "http", "identity", "manifest", "onnx", "operators", "orders",
    "packed", "plan", "policy", "request", "weights",
]  # fmt: skip


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    before = signal.signal(signal.SIGALRM, fuzz._alarm)
    yield targets(tmp_path_factory.mktemp("fuzz"))
    signal.signal(signal.SIGALRM, before)


def test_no_decoder_is_left_out(every: dict[str, Target]) -> None:
    assert sorted(every) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_valid_documents_are_taken_and_damaged_ones_refused_in_words(every: dict[str, Target], name: str) -> None:
    taken = 0
    for seed in every[name].seeds:
        try:
            every[name].run(seed)
            taken += 1
        except SplitnetError:
            continue  # some seeds are of another kind
    assert taken
    refused, fault = fuzz.fuzz(every[name], 60, seed=1)
    assert fault == ""
    assert refused


def test_a_token_id_beyond_64_bits_is_refused_in_words() -> None:
    """Found by scripts/fuzz.py: numpy's own error came out."""
    step = bytes((1, 0, 0, 0, 1, 7, 0, 2, 0)) + b"\xff" * 9 + b"\x01"
    with pytest.raises(ProtocolError, match="holds the token id 18446744073709551615"):
        decode_orders(step)


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_at_all(every: dict[str, Target], name: str) -> None:
    @settings(max_examples=8)
    @given(
        st.one_of(
            st.binary(max_size=200), st.tuples(st.sampled_from(every[name].seeds), st.integers(0, 5000), st.binary(max_size=8)).map(_put)
        )
    )
    def check(data: bytes) -> None:
        with contextlib.suppress(SplitnetError):
            every[name].run(data)

    check()


def _put(edit: tuple[bytes, int, bytes]) -> bytes:
    data, at, piece = edit
    at %= len(data) + 1
    return data[:at] + piece + data[at + len(piece) :]

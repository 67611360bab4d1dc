"""A stream of frames: small where little changes, and never a wrong answer, whatever is lost on the way."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitnet import wire
from splitnet.codecs import get_codec
from splitnet.codecs.delta import DeltaDecoder, DeltaEncoder, FrameEncoder
from splitnet.errors import ProtocolError, ReferenceLost

SIZE, CHUNK = 3000, 1024


def video(frames: int, seed: int = 0, dtype: str = "float32") -> list[np.ndarray]:
    """A picture of which a tenth changes from frame to frame."""
    rng = np.random.default_rng(seed)
    picture = np.maximum(rng.standard_normal(SIZE), 0)
    made = []
    for _ in range(frames):
        at = int(rng.integers(0, SIZE - SIZE // 10))
        picture[at : at + SIZE // 10] = np.maximum(rng.standard_normal(SIZE // 10), 0)
        made.append(picture.astype(dtype))
    return made


def sent(encoder: FrameEncoder, array: np.ndarray) -> list[bytes]:
    return [bytes(encoder.encode(array[first : first + CHUNK])) for first in range(0, array.size, CHUNK)]


def received(decoder: DeltaDecoder, payloads: list[bytes], like: np.ndarray) -> np.ndarray:
    frame, out = decoder.frame(), np.ones(like.size + 2, like.dtype)
    try:
        for first, payload in zip(range(0, like.size, CHUNK), payloads, strict=True):
            frame.decode(memoryview(payload), out[1 + first : 1 + min(first + CHUNK, like.size)])
    finally:
        assert out[0] == out[-1] == 1
    frame.complete()
    return out[1:-1]


def assert_near(found: np.ndarray, true: np.ndarray, peak: float) -> None:
    finite = np.isfinite(true)
    assert np.array_equal(found[~finite], true[~finite], equal_nan=True)
    assert np.abs(found[finite] - true[finite]).max(initial=0.0) <= peak / 254 * 1.01


def test_what_does_not_change_costs_next_to_nothing_and_nothing_drifts() -> None:
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    sizes = []
    for array in video(25):
        frame = encoder.frame()
        payloads = sent(frame, array)
        encoder.delivered(frame)
        assert_near(received(decoder, payloads, array), array, peak=6.0)
        sizes.append(sum(map(len, payloads)))
    assert sizes[0] < SIZE * 4 / 4
    assert max(sizes[1:]) < sizes[0] / 2


@given(
    lost=st.lists(st.booleans(), min_size=12, max_size=12),
    told=st.lists(st.booleans(), min_size=12, max_size=12),
    scenes=st.lists(st.sampled_from([1.0, 1.0, 1.0, 0.0, 100.0, 1e-3, 1e6]), min_size=12, max_size=12),
    odd=st.sampled_from([None, np.nan, np.inf, -np.inf]),
)
@settings(max_examples=60, deadline=None)
def test_a_lost_frame_never_makes_a_wrong_answer(lost: list[bool], told: list[bool], scenes: list[float], odd: float | None) -> None:
    """Frames are lost although the encoder was told that they were delivered. What comes out is right or refused."""
    encoder, decoder = DeltaEncoder(key_every=5), DeltaDecoder()
    peak, refused, remedies = 0.0, 0, set()
    for array, is_lost, is_told, scene in zip(video(12), lost, told, scenes, strict=True):
        array = array * np.float32(scene)
        if odd is not None:
            array[7] = odd
        peak = max(peak, float(np.abs(array[np.isfinite(array)]).max()))
        frame = encoder.frame()
        payloads = sent(frame, array)
        encoder.delivered(frame)
        if is_lost:
            continue
        try:
            assert_near(received(decoder, payloads, array), array, peak)
        except ReferenceLost as error:
            remedies.add(error.remedy)
            refused += 1
            if is_told:
                encoder.lost()
    assert refused <= 5 * sum(lost), "a key frame ends it"
    assert all("send the request again" in remedy for remedy in remedies)


def test_after_a_loss_that_was_told_the_next_frame_is_whole() -> None:
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    first, second, third = video(3)
    frame = encoder.frame()
    sent(frame, first)
    encoder.delivered(frame)
    with pytest.raises(ReferenceLost, match="frame 2 refers to frame 1 of its stream, which is not here"):
        received(decoder, sent(encoder.frame(), second), second)
    encoder.lost()
    assert_near(received(decoder, sent(encoder.frame(), third), third), third, 6.0)


def test_frames_refer_only_to_what_was_delivered() -> None:
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    arrays = video(6)
    under_way = encoder.frame()
    sent(under_way, arrays[0])  # nobody said that it arrived
    frame = encoder.frame()
    assert_near(received(decoder, sent(frame, arrays[1]), arrays[1]), arrays[1], 6.0)
    encoder.delivered(frame)
    encoder.delivered(under_way)  # an older one, late: it does not become the reference
    assert_near(received(decoder, sent(encoder.frame(), arrays[2]), arrays[2]), arrays[2], 6.0)


def test_another_size_and_other_types_are_whole_frames() -> None:
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    for array in (video(1)[0], video(1)[0][:1500], np.arange(2000), video(1, dtype="float16")[0], np.arange(2000) > 7):
        frame = encoder.frame()
        found = received(decoder, sent(frame, array), array)
        encoder.delivered(frame)
        if array.dtype.kind == "f":
            assert_near(found, array, 6.0)
        else:
            np.testing.assert_array_equal(found, array)


def test_frames_of_another_stream_are_no_reference() -> None:
    ours, theirs, decoder = DeltaEncoder(), DeltaEncoder(), DeltaDecoder()
    first, second = video(2)
    for encoder in (ours, theirs):
        frame = encoder.frame()
        received(decoder, sent(frame, first * (1 if encoder is ours else 2)), first)
        encoder.delivered(frame)
    with pytest.raises(ReferenceLost):
        received(decoder, sent(ours.frame(), second), second)


def test_frames_cross_the_wire() -> None:
    encoder, decoder, sizes = DeltaEncoder(), DeltaDecoder(), []
    for array in video(3):
        sending, receiving = encoder.frame(), decoder.frame()
        assembler: wire.TensorAssembler | None = None
        size = 0
        for head, payload in wire.tensor_chunks("x", array.reshape(30, 100).T, "delta", 4 * CHUNK, sending.encode):
            assembler = assembler or wire.TensorAssembler(head, decode=receiving.decode)
            assembler.add(head, payload)
            size += len(payload)
        assert assembler is not None
        encoder.delivered(sending)
        receiving.complete()
        assert_near(assembler.array(), array.reshape(30, 100).T, 6.0)
        sizes.append(size)
    assert sizes[1] < sizes[0] / 2


def test_the_codec_alone_refuses_what_refers_to_another_frame() -> None:
    encoder = DeltaEncoder()
    first, second = video(2)
    frame = encoder.frame()
    sent(frame, first)
    encoder.delivered(frame)
    with pytest.raises(ReferenceLost):
        get_codec("delta").decode(memoryview(sent(encoder.frame(), second)[0]), np.empty(CHUNK, np.float32))


@given(flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_hostile_deltas_are_decoded_or_refused(flips: list[tuple[int, int]]) -> None:
    encoder, decoder = DeltaEncoder(), DeltaDecoder()
    first, second = video(2)
    frame = encoder.frame()
    received(decoder, sent(frame, first), first)
    encoder.delivered(frame)
    payloads = [bytearray(payload) for payload in sent(encoder.frame(), second)]
    for place, change in flips:
        payloads[1][place % len(payloads[1])] ^= change
    with contextlib.suppress(ProtocolError, ReferenceLost):
        received(decoder, [bytes(payload) for payload in payloads], second)

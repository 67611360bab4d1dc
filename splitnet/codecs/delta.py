"""What changed since an earlier frame of the same stream: for video and sensors, whose activations hardly differ from one to the next.

A number's code is round(x / step), with the step of the last key frame (its largest |x| / 127). What is sent is the difference of two
frames' codes, which are integers: nothing drifts, however long the stream, and where nothing changed there are zeros.

Each payload names its stream, its frame, and the frame it refers to, so a frame that was lost never makes a wrong answer: the decoder
has exactly the frame that is named, or raises ReferenceLost. The encoder refers only to frames of which it was told that they were
delivered (on an ordered stream: written to the end), goes back to a key frame when it is told that something was lost, and sends one in
every `key_every` in any case. A frame that fits no reference (another size, a change of scene) is a key frame, chunk by chunk.

By itself, as the registry has it, the codec makes key frames only: int8 with one scale per chunk and an entropy coder.
"""

from __future__ import annotations

import secrets
import struct
import threading
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from splitnet.codecs.base import Buffer
from splitnet.codecs.lossy import Lossy
from splitnet.codecs.sections import SectionReader, SectionWriter
from splitnet.errors import ReferenceLost

__all__ = ["Delta", "DeltaDecoder", "DeltaEncoder", "FrameDecoder", "FrameEncoder"]

_HEAD = struct.Struct("<QIIf")  # stream, frame, the frame referred to (0: none), step
_KEY_CODES = 127
_MOST_CODES = 30_000  # differences of codes fit 16 bits, if need be by turning over
_KEPT_FRAMES = 4  # by the decoder: as many as may be on their way until the encoder refers to the first of them


@dataclass(frozen=True, slots=True)
class _Codes:
    """A chunk, quantised: what the next frame's chunk in the same place may refer to."""

    frame: int
    step: float
    codes: np.ndarray  # int16


class Delta(Lossy):
    """One chunk. `reference`: what it may refer to, or what it is decoded against."""

    name: ClassVar[str] = "delta"
    bound: ClassVar[str] = "max|x| of the chunk / 254; in a stream, max|x| of the last key frame's chunk / 254"
    entropy: ClassVar[bool] = True

    def __init__(self, stream: int = 0, frame: int = 1, reference: _Codes | None = None) -> None:
        self._stream = stream
        self._frame = frame
        self._reference = reference
        self.made: _Codes | None = None  #: what was encoded or decoded last; None where it went without loss

    def _pack(self, values: np.ndarray, writer: SectionWriter) -> None:
        reference = self._fitting(values)
        step = reference.step if reference else _step(values)
        codes = np.rint(values * np.float32(1 / step)).astype(np.int16)
        change = codes - reference.codes if reference else codes
        folded = (change << 1 ^ change >> 15).view(np.uint16)  # small whatever the sign
        low = folded.astype(np.uint8)
        writer.plain(_HEAD.pack(self._stream, self._frame, reference.frame if reference else 0, step))
        writer.add(low, repeats=4 * int(np.count_nonzero(low)) < low.size)
        writer.add((folded >> 8).astype(np.uint8), repeats=True)
        self._keep(_Codes(self._frame, step, codes))

    def _unpack(self, reader: SectionReader, values: np.ndarray) -> None:
        stream, frame, named, step = _HEAD.unpack(reader.plain(_HEAD.size))
        low, high = reader.take(values.size), reader.take(values.size)
        folded = low | high.astype(np.uint16) << 8
        codes = (folded >> 1).view(np.int16) ^ -(folded & 1).view(np.int16)
        if named:
            reference = self._reference
            if reference is None or (stream, named) != (self._stream, reference.frame):
                raise ReferenceLost(
                    f"delta chunk: frame {frame} refers to frame {named} of its stream, which is not here",
                    remedy="send the request again: once the sender knows, it sends a whole frame",
                )
            if reference.codes.size != codes.size or reference.step != step:
                raise reader.wrong(f"frame {frame} does not fit frame {named}, which it refers to")
            codes = codes + reference.codes
        np.multiply(codes, np.float32(step), out=values, dtype=np.float32)
        self._keep(_Codes(frame, step, codes))

    def _bound(self, values: np.ndarray) -> float:
        reference = self._fitting(values)
        return (reference.step if reference else _step(values)) * (0.5 + 2.0**-8)

    def _keep(self, made: _Codes) -> None:
        if self._stream:  # the codec of the registry has no stream, and is used by several threads
            self.made = made

    def _fitting(self, values: np.ndarray) -> _Codes | None:
        """The reference, where it has the size, and a step that is neither too fine nor twice too coarse."""
        reference = self._reference
        if reference is None or reference.codes.size != values.size:
            return None
        peak = max(float(values.max()), -float(values.min()))
        return reference if _KEY_CODES / 2 <= peak / reference.step <= _MOST_CODES else None


def _step(values: np.ndarray) -> float:
    peak = max(float(values.max()), -float(values.min()))
    return float(np.float32(max(peak / _KEY_CODES, 2.0**-120)))


# ------------------------------------------------------------------------------------------------------------------ streams


@dataclass(slots=True)
class _Frame:
    number: int
    since_key: int  # frames since the last one that refers to none
    chunks: list[_Codes | None] = field(default_factory=list)


class DeltaEncoder:
    """The sending end of a stream of frames; safe to use from several threads, frames of it being encoded at the same time included."""

    def __init__(self, key_every: int = 30) -> None:
        self._key_every = key_every
        self._lock = threading.Lock()
        self._stream = 0
        self._number = 0
        self._delivered: _Frame | None = None
        self.lost()

    def frame(self) -> FrameEncoder:
        """The next frame."""
        with self._lock:
            self._number += 1
            reference = self._delivered
            if reference is not None and reference.since_key + 1 >= self._key_every:
                reference = None
            return FrameEncoder(self._stream, self._number, reference)

    def delivered(self, frame: FrameEncoder) -> None:
        """From now on frames may refer to this one: the receiver has it, or will have it before whatever is sent from now on."""
        with self._lock:
            newer = self._delivered is None or frame.made.number > self._delivered.number
            if frame.stream == self._stream and newer:
                self._delivered = frame.made

    def lost(self) -> None:
        """The receiver may not have what was delivered: the next frame is a key frame, of a new stream."""
        with self._lock:
            self._stream = secrets.randbits(63) + 1
            self._number = 0
            self._delivered = None


class FrameEncoder:
    """Encodes one frame's chunks, in order."""

    def __init__(self, stream: int, number: int, reference: _Frame | None) -> None:
        self.stream = stream
        self.made = _Frame(number, reference.since_key + 1 if reference else 0)
        self._reference = reference

    def encode(self, chunk: np.ndarray) -> Buffer:
        place = len(self.made.chunks)
        known = self._reference.chunks if self._reference else []
        codec = Delta(self.stream, self.made.number, known[place] if place < len(known) else None)
        payload = codec.encode(chunk)
        self.made.chunks.append(codec.made if payload[0] in (2, 3) else None)
        return payload


class DeltaDecoder:
    """The receiving end. It keeps the codes of the newest few frames: two bytes per number and frame."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stream = 0
        self._frames: dict[int, list[_Codes | None]] = {}

    def frame(self) -> FrameDecoder:
        return FrameDecoder(self)

    def _find(self, stream: int, number: int, place: int) -> _Codes | None:
        with self._lock:
            chunks = self._frames.get(number, []) if stream == self._stream else []
            return chunks[place] if place < len(chunks) else None

    def _add(self, stream: int, number: int, chunks: list[_Codes | None]) -> None:
        with self._lock:
            if stream != self._stream:
                self._stream, self._frames = stream, {}
            self._frames[number] = chunks
            for old in sorted(self._frames)[:-_KEPT_FRAMES]:
                del self._frames[old]


class FrameDecoder:
    """Decodes one frame's chunks, in order. Raises ReferenceLost; whatever it raises, the frame cannot be gone on with."""

    def __init__(self, stream: DeltaDecoder) -> None:
        self._decoder = stream
        self._chunks: list[_Codes | None] = []
        self._name: tuple[int, int] | None = None

    def decode(self, payload: memoryview, out: np.ndarray) -> None:
        place, reference, stream = len(self._chunks), None, 1
        if len(payload) >= 5 + _HEAD.size and payload[0] in (2, 3):
            stream, number, named, _ = _HEAD.unpack_from(payload, 5)
            if named:
                reference = self._decoder._find(stream, named, place)
            self._name = self._name or (stream, number)
        codec = Delta(stream, 1, reference)
        codec.decode(payload, out)
        self._chunks.append(codec.made)

    def complete(self) -> None:
        """All chunks were decoded: later frames may refer to this one."""
        if self._name:
            self._decoder._add(*self._name, self._chunks)

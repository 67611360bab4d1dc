"""Bit-exact rearrangements that make floats compressible: the exact zeros in a bitmask, signs moved out of the exponents' way, bytes of
equal place together (the shuffle filter of HDF5 and Blosc)."""

from __future__ import annotations

import numpy as np

from splitnet.codecs.base import as_reals
from splitnet.codecs.codes import blocks
from splitnet.codecs.sections import SectionReader, SectionWriter

__all__ = ["bits_of", "pack", "read_mask", "unpack", "write_mask"]

_ZEROS_WORTH_A_MASK = 1 / 8  # the mask costs one bit per number; measured on activations after ReLU


def bits_of(chunk: np.ndarray) -> np.ndarray:
    """The chunk's numbers as unsigned integers of their size: a view. Both parts of complex ones."""
    reals = as_reals(chunk)
    numbers = chunk if reals is None else reals
    return numbers.view(f"<u{numbers.itemsize}")


def pack(chunk: np.ndarray, writer: SectionWriter) -> None:
    """One byte (1: zeros stand in a mask), the mask, then the planes of the other numbers."""
    bits = bits_of(chunk)
    floats = as_reals(chunk) is not None
    mask = bits != 0 if floats else None
    count = bits.size if mask is None else int(np.count_nonzero(mask))  # of bools: four times as fast as of the numbers
    masked = bits.size - count > bits.size * _ZEROS_WORTH_A_MASK
    writer.byte(masked)
    if masked and mask is not None:
        bits = write_mask(bits, mask, count, writer)
    planes = np.empty((bits.itemsize, bits.size), np.uint8)
    for block in blocks(bits.size):
        part = _exponent_first(bits[block]) if floats else bits[block].copy()
        for place, plane in enumerate(planes):
            if place:
                part >>= 8
            plane[block] = part  # its lowest byte: cutting off is vectorised, taking every fourth byte is not
    for plane in planes:
        writer.add(plane, repeats=not floats)


def unpack(reader: SectionReader, out: np.ndarray) -> None:
    """The reverse of `pack`."""
    bits = bits_of(out)
    masked = reader.byte()
    if masked > 1:
        raise reader.wrong(f"a first byte of {masked}")
    places = read_mask(reader, bits.size) if masked else None
    found = bits if places is None else np.empty(places.size, bits.dtype)
    planes = [reader.take(found.size) for _ in range(found.itemsize)]
    floats = as_reals(out) is not None
    elements = found.view(np.uint8).reshape(-1, found.itemsize)
    for block in blocks(found.size):
        for place, plane in enumerate(planes):
            elements[block, place] = plane[block]
        if floats:
            found[block] = _exponent_last(found[block])
    if places is not None:
        bits[:] = 0
        bits[places] = found


def write_mask(bits: np.ndarray, mask: np.ndarray, count: int, writer: SectionWriter) -> np.ndarray:
    """Writes which of the numbers are not +0, as `mask` says, and returns those `count`."""
    writer.number(count)
    writer.add(np.packbits(mask, bitorder="little"), repeats=True)
    return np.compress(mask, bits)


def read_mask(reader: SectionReader, size: int) -> np.ndarray:
    """The places of the numbers that are not zero, of `size`."""
    count = reader.number(size)
    places = np.flatnonzero(np.unpackbits(reader.take(-(-size // 8)), count=size, bitorder="little").view(bool))
    if places.size != count:
        raise reader.wrong(f"a mask of {places.size} numbers, {count} were declared")
    return places


def _exponent_first(bits: np.ndarray) -> np.ndarray:
    """The sign goes to the end, so that the exponent fills the first byte alone."""
    turned: np.ndarray = bits << 1
    turned |= bits >> 8 * bits.itemsize - 1
    return turned


def _exponent_last(bits: np.ndarray) -> np.ndarray:
    turned: np.ndarray = bits >> 1
    turned |= bits << 8 * bits.itemsize - 1
    return turned

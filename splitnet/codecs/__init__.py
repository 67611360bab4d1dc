"""The codecs, by name. A new one is a new file and a line in `_CODECS`."""

from __future__ import annotations

from splitnet.codecs.base import Buffer, Codec
from splitnet.codecs.cast import BFloat16, BFloat16Zstd, Float16, Float16Zstd
from splitnet.codecs.coarse import Clip2, Clip3, Clip4, Step4, Wide2
from splitnet.codecs.delta import Delta
from splitnet.codecs.groups import Int4, Int4Zstd, Int8, Int8Zstd
from splitnet.codecs.lossless import ShuffleZstd, ZeroMask
from splitnet.codecs.raw import Raw
from splitnet.codecs.rotated import Hadamard4, Hadamard4Zstd
from splitnet.errors import BadInput

__all__ = ["Buffer", "Codec", "codec_names", "get_codec"]

_CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Raw(), ShuffleZstd(), ZeroMask(), BFloat16(), BFloat16Zstd(), Float16(), Float16Zstd(),
        Int8(), Int8Zstd(), Int4(), Int4Zstd(), Hadamard4(), Hadamard4Zstd(), Step4(), Clip4(), Clip3(), Clip2(), Wide2(),
        Delta(),
    )
}  # fmt: skip


def codec_names(*, default: bool = False) -> tuple[str, ...]:
    """All, or only those that may be chosen without a calibration."""
    return tuple(name for name, codec in _CODECS.items() if codec.default or not default)


def get_codec(name: str) -> Codec:
    """Raises BadInput for a name that is not registered."""
    try:
        return _CODECS[name]
    except KeyError:
        raise BadInput(
            f"codec {name!r} is not one of {', '.join(_CODECS)}", remedy="choose one of these, or update splitnet on this node"
        ) from None

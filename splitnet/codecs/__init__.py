"""The codecs, by name. A new one is a new file and a line in `_CODECS`."""

from __future__ import annotations

from splitnet.codecs.base import Buffer, Codec
from splitnet.codecs.lossless import ShuffleZstd
from splitnet.codecs.raw import Raw
from splitnet.errors import BadInput

__all__ = ["Buffer", "Codec", "codec_names", "get_codec"]

_CODECS: dict[str, Codec] = {codec.name: codec for codec in (Raw(), ShuffleZstd())}


def codec_names() -> tuple[str, ...]:
    return tuple(_CODECS)


def get_codec(name: str) -> Codec:
    """Raises BadInput for a name that is not registered."""
    try:
        return _CODECS[name]
    except KeyError:
        raise BadInput(
            f"codec {name!r} is not one of {', '.join(_CODECS)}", remedy="choose one of these, or update splitnet on this node"
        ) from None

"""What a draft's stages pay for what they receive or compute again, and which codecs there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from partitioner.constants import codec_figures
from partitioner.cost import CodecFigures
from splitnet.cluster import ClusterNode
from splitnet.codecs import codec_names, get_codec

if TYPE_CHECKING:
    from partitioner.draft import Draft

__all__ = ["DraftPrices", "measured_codecs"]


@dataclass(frozen=True)
class DraftPrices:
    """See `partitioner.layout.Prices`: what sending costs on the link between the stages' nodes, and computing on the node."""

    draft: Draft
    order: tuple[int, ...]

    def receive_s(self, value: str, source: int | None, target: int) -> float:
        draft = self.draft
        first = 0 if source is None else source
        a, b = draft.names[self.order[first]], draft.names[self.order[target]]
        if a == b:
            return 0.0
        if draft.privacy is not None and value in draft.privacy.values:
            return math.inf
        link = draft.links.get((a, b))
        if link is None:
            return math.inf
        size_bytes, maker = draft.structure.value_bytes[value], draft.structure.producer[value].name
        names = ("raw",) if source is None else draft.wishes.link_codecs.get((a, b), tuple(draft.figures))
        each = [
            c.encode_s(size_bytes, a) + size_bytes / c.ratio_of(maker) / link.bandwidth_bytes_per_s + c.decode_s(size_bytes, b)
            for c in (draft.figures[name] for name in names)
        ]
        messages = sum(draft.overheads[node].message_s for node in (a, b))
        return min(each, default=math.inf) + messages

    def compute_s(self, stage: int, operator: str) -> float:
        return float(self.draft.seconds[self.order[stage], self.draft.place[operator]])


def measured_codecs(nodes: Sequence[ClusterNode], names: Sequence[str] | None = None) -> Mapping[str, CodecFigures]:
    """The lossless codecs that every node has measured; raw always."""
    known = set(names or codec_names()) & set(codec_names())
    return {name: figures for name, figures in codec_figures(nodes).items() if name in known and get_codec(name).lossless}

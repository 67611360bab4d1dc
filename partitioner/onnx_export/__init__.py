"""A stage's graph document as an ONNX graph.

A converter of our own, and not `torch.onnx.export`: it starts from the document that the shard holds, so that both engines compute the same
stage; it takes milliseconds where tracing a stage again takes seconds; it keeps names, weights and symbolic sizes as they are; and planning needs no
more packages for it. What it does not know has no ONNX member, and the shard says why.
"""

from __future__ import annotations

from collections.abc import Mapping

from partitioner.onnx_export.builder import Unconvertible
from partitioner.onnx_export.converting import convert, converters
from splitnet.graph import GraphDocument
from splitnet.onnx_format import to_bytes
from splitnet.onnx_nouns import ONNX_MEMBER
from splitnet.tensors import TensorSpec

__all__ = ["Unconvertible", "convert", "converters", "onnx_member"]


def onnx_member(document: GraphDocument, values: Mapping[str, TensorSpec]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """What a shard holds for ONNX Runtime, by its name in the shard; nothing where the document has no counterpart, and then a note
    that says why."""
    try:
        return {ONNX_MEMBER: to_bytes(convert(document, values))}, ()
    except Unconvertible as reason:
        return {}, (f"no graph for ONNX Runtime: {reason}"[:1024],)

"""The nouns of a stage's ONNX graph, and which operators it may name. `splitnet.onnx_format` writes and reads it.

An ONNX graph of a shard is one flat list of operators of the standard domain: no control flow, so no graphs within graphs; no functions, no
custom operators; nothing that draws random numbers, holds text, or depends on the machine. Its weights stand in the shard's
weights.safetensors; in the graph, WEIGHT goes before their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "ALLOWED_OPERATORS", "NEWEST_OPSET", "OLDEST_OPSET", "ONNX_MEMBER", "OPSET", "WEIGHT", "Attribute", "OnnxGraph", "OnnxNode", "OnnxTensor",
    "OnnxValue",
]  # fmt: skip

ONNX_MEMBER = "graph.onnx"  #: the file in a shard
WEIGHT = "weight/"  #: goes before a weight's name, so that no value is called like it

OPSET = 20  #: what the planner writes: the first that has Gelu; ONNX Runtime reads it since 1.17
OLDEST_OPSET, NEWEST_OPSET = 9, 24  #: what a node reads: a model that came as .onnx keeps its own

#: Deterministic, without side effects, and with kernels in ONNX Runtime for processors. Left out on purpose: If, Loop, Scan (graphs within
#: graphs), Random*, Multinomial, Bernoulli, Dropout (chance), StringNormalizer and its like (texts), TfIdfVectorizer, everything of
#: sequences and optional values, and all other domains.
ALLOWED_OPERATORS = frozenset(
    (
        "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "Attention", "AveragePool",
        "BatchNormalization", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Concat", "Constant",
        "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Einsum",
        "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
        "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "GroupNormalization", "HardSigmoid",
        "HardSwish", "Hardmax", "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization", "LeakyRelu",
        "Less", "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mish", "Mod",
        "Mul", "Neg", "Not", "OneHot", "Or", "PRelu", "Pad", "Pow", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "RMSNormalization", "RNN", "Range",
        "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
        "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "RotaryEmbedding", "Round", "ScatterElements", "ScatterND", "Selu", "Shape",
        "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split",
        "Sqrt", "Squeeze", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """A constant: its elements as bytes, little-endian, in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | OnnxTensor


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input, an output or a weight. A dimension is an int, or a text that says what it is ("batch")."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """One operator. An input or output called "" is left out."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True)
class OnnxGraph:
    """Operators in an order in which each value is made before it is used. `weights` stand in the shard's safetensors (their
    names without WEIGHT), with these dtypes and shapes; `constants` are small and stand in the graph."""

    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    weights: tuple[OnnxValue, ...]
    constants: Mapping[str, OnnxTensor]
    nodes: tuple[OnnxNode, ...]
    opset: int = OPSET

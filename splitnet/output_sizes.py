"""How large a value an operator may make. A few bytes of a document, or one number in a request, can name a size of terabytes; what is
asked for is known before it is allocated, by the same operator on torch's meta device, which has shapes and no memory.

Only operators whose result's size stands in their arguments are looked at. Others make values as large as their inputs allow
(a matrix product, an addition that broadcasts): these stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from splitnet.errors import EngineFailure

__all__ = ["MAX_VALUE_BYTES", "sized"]

MAX_VALUE_BYTES = 4 << 30  #: where nothing else is said: four times what a node takes as one tensor

_MAKERS = frozenset({
    "arange", "bartlett_window", "blackman_window", "col2im", "constant_pad_nd", "diag_embed", "eye", "full", "hamming_window",
    "hann_window", "im2col", "kaiser_window", "linspace", "logspace", "new_full", "new_ones", "new_zeros", "ones", "pad", "range",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "repeat", "replication_pad1d", "replication_pad2d", "replication_pad3d",
    "tile", "tril_indices", "triu_indices", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_trilinear3d", "vander", "zeros",
})  # fmt: skip
_SQUARED = frozenset({"diag_embed", "eye", "im2col"})  # makers that use a number more than once
_WIDEST_BYTES = 32  # twice the widest element: a range from -n to n has 2n
_VIEWS = frozenset({"as_strided", "broadcast_to", "expand", "expand_as", "unfold"})  # cost nothing themselves; what copies them does


def sized(name: str, function: Callable[..., Any], schema: Any, torch: Any, max_bytes: int) -> Callable[..., Any]:
    """The operator behind a look at its result's size, where its arguments say that. It raises EngineFailure."""
    packet = name.split(".")[1]
    if packet in _VIEWS:

        def view(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            _check(name, result, max_bytes)
            return result

        return view
    if packet not in _MAKERS:
        return function
    elsewhere = {"device": "meta"} if any(argument.name == "device" for argument in schema.arguments) else {}

    def without_memory(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")
        return [without_memory(item) for item in argument] if isinstance(argument, list | tuple) else argument

    quick = packet not in _SQUARED

    def make(*args: Any, **kwargs: Any) -> Any:
        if quick and _at_most([*args, *kwargs.values()], torch.Tensor) * _WIDEST_BYTES <= max_bytes:
            return function(*args, **kwargs)
        try:
            shown = function(*map(without_memory, args), **{key: without_memory(value) for key, value in kwargs.items()} | elsewhere)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            shown = None  # wrong arguments, which the operator itself complains of; or sizes that stand in a tensor
        if shown is not None:
            _check(name, shown, max_bytes)
        return function(*args, **kwargs)

    return make


def _at_most(arguments: Sequence[Any], tensor: type) -> float:
    """A bound on the result's elements that costs next to nothing: the meta device takes ten times as long as a small operator. Every
    number may be a size, an addition to one, a factor, or a step."""
    product: float = 1
    for argument in arguments:
        if isinstance(argument, int | float):
            size = abs(argument)
            product *= 1 + (1 / size if 0 < size < 1 else size)
        elif isinstance(argument, tensor):
            for size in argument.shape:  # type: ignore[attr-defined] # torch is not known here
                product *= max(size, 1)
        elif isinstance(argument, list | tuple):
            product *= _at_most(argument, tensor)
    return product


def _check(name: str, value: Any, max_bytes: int) -> None:
    size_bytes = value.numel() * value.element_size()
    if size_bytes > max_bytes:
        raise EngineFailure(
            f"operator {name} would make a value of {size_bytes} bytes, shape {tuple(value.shape)}; a stage here may make {max_bytes}",
            remedy="send smaller inputs, or raise the node's --max-tensor",
        )

"""A document, or a number in a request, may not ask for a value larger than the node allows: refused before it is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitnet.errors import EngineFailure
from splitnet.graph import DEVICE, Dtype, GraphDocument, Input, Operator, Ref
from splitnet.interpreter import Program

HUGE = 1 << 28
LIMIT = 1 << 20
OPERATORS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("aten.full.default", ((Ref("n"),), 1.0), {}),
    ("aten.full.default", ((Ref("n"),), 1.0), {"dtype": Dtype("float32"), "device": DEVICE}),
    ("aten.zeros.default", ((2, Ref("n")),), {}),
    ("aten.arange.default", (Ref("n"),), {}),
    ("aten.arange.start_step", (0, Ref("n"), 2), {"device": DEVICE}),
    ("aten.eye.default", (Ref("n"),), {}),
    ("aten.new_ones.default", (Ref("x"), (Ref("n"),)), {}),
    ("aten.repeat.default", (Ref("x"), (Ref("n"), 1)), {}),
    ("aten.expand.default", (Ref("row"), (Ref("n"), 4)), {}),
    ("aten.constant_pad_nd.default", (Ref("x"), (0, Ref("n")), 0.0), {}),
    ("aten.upsample_nearest2d.default", (Ref("image"), (Ref("n"), 8)), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), OPERATORS, ids=lambda given: given if isinstance(given, str) else "")
def test_what_is_too_large_is_refused_and_what_is_not_is_made(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = (Input("n", "int"), Input("x"), Input("row"), Input("image"))
    document = GraphDocument(inputs, {}, (Operator(name, args, kwargs, "made"),), ("made",))
    program = Program(document, torch, {}, max_value_bytes=LIMIT)
    given = [torch.ones(2, 4), torch.ones(1, 4), torch.ones(1, 1, 2, 8)]
    with pytest.raises(EngineFailure, match=f"{name}.* would make a value of .*may make {LIMIT}"):
        program.run([HUGE, *given])
    (made,) = program.run([8, *given])
    assert 0 < made.numel() * made.element_size() <= LIMIT

from __future__ import annotations

import re

import grpc
import pytest

from splitnet import errors
from splitnet.errors import ServiceError, SplitnetError, UserError

CLASSES = sorted(
    (value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SplitnetError)), key=lambda cls: cls.__name__
)


def _documented_parents() -> dict[str, str]:
    """Child -> parent, read from the tree in the module's docstring."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    (?P<indent>[ |`-]*)(?P<name>[A-Z]\w+)(?: {2,}\S.*)?$", line)
        if match is None:
            continue
        depth = len(match["indent"])
        while path and path[-1][0] >= depth:
            path.pop()
        if path:
            parents[match["name"]] = path[-1][1]
        path.append((depth, match["name"]))
    return parents


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    real = {cls.__name__: cls.__mro__[1].__name__ for cls in CLASSES if cls is not SplitnetError}
    assert _documented_parents() == real


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_can_travel_and_exit(cls: type[SplitnetError]) -> None:
    assert errors.error_class(cls.__name__) is cls
    assert cls.grpc_code in {code.value[0] for code in grpc.StatusCode} - {grpc.StatusCode.OK.value[0]}
    assert cls.exit_status == (2 if issubclass(cls, UserError) else 1)


def test_an_unknown_kind_is_a_service_error() -> None:
    assert errors.error_class("FromTheFuture") is ServiceError


def test_a_message_names_the_place_and_the_remedy() -> None:
    error = UserError("wrong dtype", remedy="send float32", node="a", stage="s0", request="r7")
    assert str(error) == "node 'a', stage 's0', request 'r7': wrong dtype\n  remedy: send float32"
    assert str(UserError("plain")) == "plain"


def test_the_place_is_filled_in_once() -> None:
    error = UserError("wrong", stage="inner").at(node="a", stage="outer")
    assert (error.node, error.stage, error.request) == ("a", "inner", "")

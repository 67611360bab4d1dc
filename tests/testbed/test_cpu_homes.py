"""Which processor a node of the testbed keeps to."""

from __future__ import annotations

from testbed.cpu import homes


def test_nodes_stand_where_there_is_most_left() -> None:
    assert homes({"weak": 0.25, "strong": 0.8, "mid": 0.5}, [0, 1]) == {"strong": 0, "mid": 1, "weak": 1}
    assert homes({"a": 0.4, "b": 0.4, "c": 0.4}, [2, 5]) == {"a": 2, "b": 5, "c": 2}


def test_a_node_without_room_keeps_to_none() -> None:
    assert homes({"two": 1.2, "one": 1.0}, [0, 1]) == {"one": 0}
    assert homes({"a": 0.7, "b": 0.7, "c": 0.7}, [0, 1]) == {"a": 0, "b": 1}
    assert homes({"unlimited": 0.0}, [0]) == {}

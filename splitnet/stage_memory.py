"""What a stage takes of its node's memory: the rule by which the planner places stages and by which a node admits them."""

from __future__ import annotations

__all__ = ["BUFFERED_REQUESTS", "stage_memory_bytes"]

BUFFERED_REQUESTS = 2  #: requests whose inputs a stage holds at the least: the one that computes, the one that arrives meanwhile


def stage_memory_bytes(param_bytes: int, activation_bytes: int, received_bytes: int) -> int:
    """`received_bytes`: what one request delivers to the stage, from other stages or from the client, decoded."""
    return param_bytes + activation_bytes + BUFFERED_REQUESTS * received_bytes

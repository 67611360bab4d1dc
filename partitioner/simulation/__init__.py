"""What a plan does with many requests, played event by event as the nodes work them off. Pure arithmetic, an event heap of its own: the few
resources there are need no library.

- A node has one compute thread that runs stages first come, first served, each once all its inputs of a request are there
  (`nodes.compute`, `nodes.pipeline`). Encoding, decoding and the node's other work for a request use the same processor and go before, as
  an operating system lets short work go before long: a stage that runs is put on hold. With a `spare_core` they run beside it.
- Nodes on one machine (`partitioner.cost.Machine`), and the links between them, share its cores evenly while they want more than it has.
- A value goes to every other node over the one stream per directed pair: what the transport has taken goes in order, what still waits for
  it (`nodes.outbox`) takes turns, request by request and chunk by chunk. Transmission keeps the link busy, propagation does not. Within a node it takes no time. What goes from one stage to another is encoded, then
  sent, then decoded as a whole; that these overlap within a tensor of several chunks is left out.
- The ingress admits `max_in_flight` requests and no more (`nodes.admission`). Whoever comes meanwhile waits outside, as
  `Client.stream` does, and is let in, in order, when an answer is complete.

The costs are those of `partitioner.cost`, which has the closed forms. Where each node runs one stage, and each link serves one pair of stages,
one request alone takes `Cost.latency_s`, and many follow each other at max(bottleneck_s, latency_s / max_in_flight), exactly: such a pipeline
is an event graph (Baccelli, Cohen, Olsder, Quadrat: Synchronization and Linearity, 1992). What is between, who waits for whom where stages
share a node or a link, is what this is for.
"""

from __future__ import annotations

from partitioner.simulation.playing import simulate
from partitioner.simulation.records import Interval, Kind, Passage, Simulation

__all__ = ["Interval", "Kind", "Passage", "Simulation", "simulate"]

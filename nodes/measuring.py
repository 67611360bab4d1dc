"""What this node measures when it is asked to: a link, its own speed, a model's operators, what it spends besides computing."""

from __future__ import annotations

import math

from nodes.compute import ComputeThread
from nodes.ledger import Ledger
from nodes.measuring_decoder import DecoderTimer
from nodes.measuring_operators import OperatorTimer
from nodes.measuring_overhead import measure_overhead
from nodes.store import BlobStore
from splitnet.channel import open_channel, stub, translated
from splitnet.errors import BadInput
from splitnet.linkprobe import measure_link
from splitnet.reference_kernel import measure_reference
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["Measurer"]

_BUDGET_S = 2.0
_LONGEST_BUDGET_S = 60.0


class Measurer:
    def __init__(self, ledger: Ledger, store: BlobStore, compute: ComputeThread) -> None:
        self._threads = ledger.config.threads
        self._compute = compute
        self._operators = OperatorTimer(ledger, store, compute)
        self._decoder = DecoderTimer(ledger, compute)

    async def measure(self, request: pb.MeasureRequest) -> pb.MeasureReply:
        """Raises BadInput for a request that asks for nothing, and what the measurement raises."""
        budget_s = min(request.budget_s, _LONGEST_BUDGET_S) if 0 < request.budget_s < math.inf else _BUDGET_S
        match request.WhichOneof("what"):
            case "peer_address":
                return await _measured_link(request.peer_address, budget_s)
            case "operators":
                pieces = await self._operators.measure(request.operators, budget_s)
                return pb.MeasureReply(pieces=pieces)
            case "decoder":
                return pb.MeasureReply(decoder=await self._decoder.measure(request.decoder, budget_s))
            case "compute" if request.compute:
                reference = await self._compute.call(lambda: measure_reference(self._threads, budget_s))
                return pb.MeasureReply(seconds=reference.seconds)
            case "overhead" if request.overhead:
                return pb.MeasureReply(overhead=await measure_overhead(budget_s))
        raise BadInput("Measure: neither peer_address, compute, operators, decoder nor overhead is given")


async def _measured_link(address: str, budget_s: float) -> pb.MeasureReply:
    channel = open_channel(address)
    try:
        with translated(address):
            peer = await stub(channel).Describe(pb.DescribeRequest(), timeout=budget_s + 5)
            measured = await measure_link(stub(channel), budget_s)
    finally:
        await channel.close()
    return pb.MeasureReply(
        round_trip_s=measured.round_trip_s,
        bandwidth_bytes_per_s=measured.bandwidth_bytes_per_s,
        jitter_s=measured.jitter_s,
        peer_name=peer.name,
        samples=[pb.ProbeSample(bytes=sample.bytes, seconds=sample.seconds) for sample in measured.samples],
    )

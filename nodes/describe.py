"""What a node says of itself: the reply to Describe, made from what the rooms hold."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable

import psutil

from nodes.deployment import Deployment, Stage
from nodes.engines import engine_names
from nodes.family import Family
from nodes.generation.desk import text_model
from nodes.installer import Installer
from nodes.ledger import Ledger
from nodes.link import Link, Links
from nodes.reserving import reserved_sessions
from splitnet import __version__, wire
from splitnet.codecs import codec_names
from splitnet.generation_plan import Generation
from splitnet.machine import machine_id, processor_name, usable_processors
from splitnet.noise import Noise
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.standby import followers
from splitnet.tensors import TensorSpec

__all__ = ["Describer"]


class Describer:
    def __init__(self, ledger: Ledger, installer: Installer, links: Links) -> None:
        self._ledger = ledger
        self._installer = installer
        self._links = links
        self._started_s = time.monotonic()
        self._process = psutil.Process()
        self._machine, self._processors, self._processor = machine_id(), usable_processors(), processor_name()

    def describe(self, deployment: str = "", *, plans: bool = False) -> pb.DescribeReply:
        """`deployment`: only that one, or that generation of it; an unknown name is answered with none. `plans`: with their plans."""
        ledger, config = self._ledger, self._ledger.config
        shown = [d for d in ledger.deployments.values() if deployment in ("", d.name, d.family)]
        shown.sort(key=lambda d: ledger.families.state(d) != "active")  # first, for clients that know no generations
        gone = [f for f in ledger.families if not f.generations and deployment in ("", f.name)]
        restoring = [
            pb.DeploymentStatus(name=r.name, generation=r.active, state="restoring", term=r.term)
            for r in ledger.families.restoring.values()
            if deployment in ("", r.name)
        ]
        return pb.DescribeReply(
            events=[pb.Event(**dataclasses.asdict(event)) for event in ledger.events],
            name=config.name,
            version=__version__,
            memory_limit_bytes=config.memory_bytes,
            memory_used_bytes=self._installer.reserved_bytes,
            deployments=[self._deployment(d, plans) for d in shown] + [_moved(family) for family in gone] + restoring,
            links=[_link(link, shown) for link in self._links],
            device="cpu",
            threads=config.threads,
            engines=engine_names(),
            engine=config.engine,
            codecs=codec_names(),
            uptime_s=time.monotonic() - self._started_s,
            draining=ledger.draining,
            insecure=config.open_plaintext,
            max_message_bytes=wire.MAX_MESSAGE_BYTES,
            max_tensor_bytes=config.max_tensor_bytes,
            process_memory_bytes=self._process.memory_info().rss,
            sessions_limit=config.sessions,
            sessions_reserved=reserved_sessions(ledger.deployments.values()),
            machine=self._machine,
            cores=math.ceil(self._processors),
            processors=self._processors,
            processor=self._processor,
        )

    def _deployment(self, d: Deployment, plans: bool) -> pb.DeploymentStatus:
        family = self._ledger.families.get(d.family)
        state = "active" if family is None else family.state(d.generation)
        share = family.share if family is not None else 0.0
        moved = family is not None and family.entered_here and not family.takes_requests
        return pb.DeploymentStatus(
            name=d.family,
            plan_sha256=d.plan_sha256,
            node=d.node.name,
            ingress=d.is_ingress,
            inputs=_specs(d.plan.inputs),
            outputs=_specs(output.spec for output in d.plan.outputs),
            max_in_flight=d.admission.limit,
            in_flight=self._ledger.in_flight(d),
            stages=[_stage(stage, standby=name in d.standby) for name, stage in d.held.items()],
            model=d.plan.model,
            ingress_address=d.ingress.address,
            max_batch=d.plan.batching.max_batch,
            max_delay_s=d.plan.batching.max_delay_s,
            microbatch=d.plan.batching.microbatch,
            waiting=len(d.line),
            followers=[d.plan.node(name).address for name in followers(d.plan)],
            generation=d.generation,
            state=state,
            share={"active": 1.0 - share, "canary": share}.get(state, 0.0),
            answered=d.admission.answered,
            unanswered=d.admission.unanswered,
            moved_to=family.ingress_address if family is not None and moved else "",
            term=family.term if family is not None else 0,
            exclusive=d.plan.exclusive,
            sessions=d.plan.sessions,
            plan_json=d.plan.to_json().encode() if plans else b"",
            generating=_generating(d, d.plan.generation, self._ledger.loop.time())
            if d.plan.generation is not None and d.is_ingress
            else None,
            shards={stage.spec.name: stage.shard for stage in d.held.values()} if plans else {},
            noise=_noise(d, d.plan.noise) if d.plan.noise is not None else None,
        )


def _generating(d: Deployment, generation: Generation, now_s: float) -> pb.GenerationStatus:
    """What it takes is known from the plan; what it is doing, once it has done something."""
    model = text_model(generation)
    said = pb.GenerationStatus(
        context_length=model.context_length,
        vocabulary=model.vocabulary,
        eos_token_ids=model.eos_token_ids,
        bos_token_ids=model.bos_token_ids,
        tokenizer=model.tokenizer,
        cache_tokens=model.cache_tokens,
        free_tokens=model.cache_tokens,
        kv_bytes_per_token=sum(generation.kv_bytes_per_token.values()),
    )
    if (generator := d.generator) is not None:
        for name, count in dataclasses.asdict(generator.counts).items():
            setattr(said, name, count)
        said.free_tokens = max(generator.slots.free, 0)
        said.sessions, said.kept = len(generator.slots.live), len(generator.slots.kept)
        said.passes_in_flight = len(generator.passes)
        speeds = generator.speeds
        said.answers, said.ttft_s, said.tpot_s = speeds.answers, speeds.ttft_s, speeds.tpot_s
        said.tokens_per_s = speeds.tokens_per_s(now_s)
    return said


def _noise(d: Deployment, noise: Noise) -> pb.NoiseStatus:
    released = sum(stage.noise.released for stage in d.stages.values() if stage.noise is not None)
    return pb.NoiseStatus(**dataclasses.asdict(noise), released=released)


def _moved(family: Family) -> pb.DeploymentStatus:
    return pb.DeploymentStatus(name=family.name, generation=family.active, state="moved", moved_to=family.address, term=family.term)


def _stage(s: Stage, *, standby: bool) -> pb.StageStatus:
    return pb.StageStatus(
        name=s.spec.name,
        engine=s.engine.name,
        requests=s.requests,
        failures=s.failures,
        wait_s=s.wait_s,
        decode_s=s.decode_s,
        compute_s=s.compute_s,
        encode_s=s.encode_s,
        send_s=s.send_s,
        reserved_bytes=s.reserved_bytes,
        queued=s.queued,
        standby=standby,
    )


def _link(link: Link, deployments: Iterable[Deployment]) -> pb.LinkStatus:
    goodput = link.goodput
    return pb.LinkStatus(
        target=link.target.name,
        address=link.target.address,
        sent_bytes=link.outbox.sent_bytes,
        raw_bytes=link.outbox.raw_bytes,
        frames=link.outbox.frames,
        connected=link.connected,
        goodput_bytes_per_s=goodput.bytes_per_s(time.monotonic()),
        round_trip_s=goodput.round_trip_s if link.connected else 0.0,
        queued_bytes=link.outbox.queued_bytes,
        unacknowledged_bytes=goodput.unacknowledged_bytes,
        codecs=[
            pb.CodecInUse(deployment=d.name, source=source, target=route.stage, codec=chooser.codec, switches=chooser.switches)
            for d in deployments
            if d.links.get(link.target.name) is link
            for source, route, chooser in d.choosers()
            if route.node == link.target.name
        ],
    )


def _specs(specs: Iterable[TensorSpec]) -> list[pb.TensorSpec]:
    return [pb.TensorSpec(name=spec.name, dtype=spec.dtype, shape=[str(size) for size in spec.shape]) for spec in specs]

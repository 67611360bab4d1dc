"""Where requests to generate come in and their tokens go out, at the ingress."""

from __future__ import annotations

import numpy as np

from nodes.calls import Call, Carrier
from nodes.deployment import Deployment
from nodes.generation.generator import Generator
from nodes.generation.session import Session
from nodes.ledger import Ledger
from nodes.outbox import EncodedTensor, Parcel
from nodes.pipeline import Pipeline
from splitnet.errors import BadInput, Overloaded, SplitnetError
from splitnet.generation import PROMPT, TOKENS, GenerateRequest, TextModel
from splitnet.generation_plan import Generation
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["TextDesk", "text_model"]

_MOST_UNSENT = 1024  # tokens that a client has not taken
_LONGEST_UNREAD_S = 30.0  # that it may take none while there are some


class _Writing:
    """One call's answer, on its way to the client. Tokens that come while others are being sent go together with the next ones: there is one parcel at a time."""

    def __init__(self, session: Session, generator: Generator) -> None:
        self.session = session
        self.generator = generator
        self.unsent: list[int] = []
        self.since_s: float | None = None  # when the parcel that is being sent was made
        self.said: pb.Generated | None = None  # with the last tokens, once they are there


class TextDesk:
    """Takes the place of `carrier` among the calls: those that generate are its own, the others still that one's."""

    def __init__(self, ledger: Ledger, pipeline: Pipeline, carrier: Carrier) -> None:
        self._ledger = ledger
        self._calls = ledger.calls
        self._pipeline = pipeline
        self._carrier = carrier
        self._wanted: dict[Call, GenerateRequest] = {}
        self._writing: dict[Call, _Writing] = {}

    # ------------------------------------------------------------------------------------------------------------- in

    def open(self, call: Call, frame: pb.Frame) -> None:
        """The first frame of a call has come. Raises BadInput where it does not ask for what the deployment does."""
        generates = call.deployment.plan.generation is not None
        if frame.HasField("generate") != generates:
            raise BadInput(
                f"deployment {call.deployment.name!r} " + ("only generates text" if generates else "does not generate text"),
                remedy="use client.generate" if generates else "use client.infer",
            )
        if generates:
            self._wanted[call] = GenerateRequest.from_message(frame.generate)

    def takes(self, call: Call) -> bool:
        """Whether the call is one to generate."""
        return call in self._wanted

    def begin(self, call: Call) -> None:
        """The prompt is there. Raises BadInput where it does not fit, Overloaded where there is no room."""
        generation = call.deployment.plan.generation
        assert generation is not None, "open has looked"
        wanted, prompt = self._wanted[call], call.inputs.pop(PROMPT)
        call.free(("", PROMPT))
        text_model(generation).check(prompt, wanted)
        generator = self._generator(call.deployment, generation)
        session = Session(generator.new_handle(), prompt, wanted, call, generation.eos_token_ids)
        self._writing[call] = _Writing(session, generator)
        generator.admit(session)

    def _generator(self, deployment: Deployment, generation: Generation) -> Generator:
        if deployment.generator is None:
            deployment.generator = Generator(deployment, generation, self._ledger, self._pipeline, self._new_tokens, self._failed)
        return deployment.generator

    # ------------------------------------------------------------------------------------------------------------ out

    def _new_tokens(self, session: Session, tokens: list[int]) -> None:
        call = session.call
        if call is None or (writing := self._writing.get(call)) is None:
            return
        writing.unsent += tokens
        if session.finish:
            writing.said = _generated(session)
            writing.generator.end(session)
        if writing.since_s is None:
            self._write(call, writing)
        elif len(writing.unsent) > _MOST_UNSENT or self._ledger.loop.time() - writing.since_s > _LONGEST_UNREAD_S:
            self._calls.fail(
                call,
                Overloaded(
                    f"the client does not read: {len(writing.unsent)} tokens wait for it",
                    remedy="read the answer as it comes, or ask for fewer tokens",
                ),
            )

    def _write(self, call: Call, writing: _Writing) -> None:
        said, tokens = writing.said, np.array(writing.unsent, np.int32)
        writing.unsent.clear()
        writing.since_s = self._ledger.loop.time()

        def envelope() -> pb.Frame:
            return pb.Frame(request=call.client_id, generated=said)

        def sent(parcel: Parcel) -> None:
            writing.since_s = None
            if parcel.end:
                self._calls.answered(call)
            elif writing.unsent:
                self._write(call, writing)

        tensor = EncodedTensor(TOKENS, tokens, "raw", self._pipeline.pool)
        call.client.outbox.put(Parcel(call, tensor, envelope, sent, lambda _, error: self._calls.fail(call, error), said is not None))

    def _failed(self, session: Session, error: SplitnetError) -> None:
        if session.call is not None:
            self._calls.fail(session.call, error)

    def forsake(self, call: Call, reason: str) -> None:
        """The call has ended, one way or another."""
        if self._wanted.pop(call, None) is None:
            self._carrier.forsake(call, reason)
        writing = self._writing.pop(call, None)
        if writing is not None:
            writing.generator.end(writing.session, keep=not writing.session.strikes)


def text_model(generation: Generation) -> TextModel:
    """What clients are told of it."""
    return TextModel(
        generation.context_length,
        generation.vocabulary,
        generation.cache_tokens,
        generation.eos_token_ids,
        generation.bos_token_ids,
        generation.tokenizer,
    )


def _generated(session: Session) -> pb.Generated:
    return pb.Generated(finish=session.finish, prompt_tokens=session.prompt, cached_tokens=session.cached, new_tokens=session.made)

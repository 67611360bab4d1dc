"""Where requests to generate come in and their tokens go out, at the ingress."""

from __future__ import annotations

import dataclasses

import numpy as np

from nodes.calls import Call, Carrier
from nodes.deployment import Deployment
from nodes.generation.companion import Companion, Lender
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

    def __init__(self, session: Session, generator: Generator, began_s: float) -> None:
        self.session = session
        self.generator = generator
        self.began_s = began_s
        self.first_s = 0.0  # when its first token came
        self.tokens = 0  # that have come after its first ones
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
        self._writing[call] = _Writing(session, generator, self._ledger.loop.time())
        generator.admit(session)

    def _generator(self, deployment: Deployment, generation: Generation) -> Generator:
        if deployment.generator is None:
            deployment.generator = Generator(deployment, generation, self._ledger, self._pipeline, self._new_tokens, self._failed)
        self._accompany(deployment.generator, generation)
        return deployment.generator

    def _accompany(self, generator: Generator, generation: Generation) -> None:
        """Gives it the small model that the plan names, if that is here; a new one where it was deployed again."""
        small = self._small(generation)
        if small is None or small.plan.generation is None:
            generator.companion = None
        elif generator.companion is None or generator.companion.small is not small:
            lent = self._generator(small, small.plan.generation)
            lender = Lender(lent.lend, lent.take_back, lent.new_handle)
            generator.companion = Companion(small, lender, self._ledger, self._pipeline, generator.advance)

    def _small(self, generation: Generation) -> Deployment | None:
        family = self._ledger.families.get(generation.draft) if generation.draft else None
        found = None if family is None else family.generations.get(family.active)
        if found is None or found.draining:
            return None
        own, whole = found.plan.generation, len(found.stages) == len(found.plan.stages) == 1
        fits = own is not None and not own.draft and own.vocabulary == generation.vocabulary
        if not (whole and fits):
            self._ledger.log.warning(
                "this deployment cannot guess for another: expected a whole small model with its vocabulary", deployment=found.name
            )
            return None
        return found

    def begin_again(self, call: Call) -> None:
        """Another plan answers it from here on: after the tokens that have come. Raises BadInput, Overloaded."""
        writing, generation = self._writing.get(call), call.deployment.plan.generation
        if writing is None or generation is None or writing.session.finish:
            return
        old = writing.session
        writing.generator.end(old, keep=False)
        wanted = dataclasses.replace(self._wanted[call], answered=old.made)
        prompt = old.tokens.astype(np.int64)
        text_model(generation).check(prompt, wanted)
        writing.generator = generator = self._generator(call.deployment, generation)
        writing.session = Session(generator.new_handle(), prompt, wanted, call, generation.eos_token_ids)
        generator.admit(writing.session)

    # ------------------------------------------------------------------------------------------------------------ out

    def _new_tokens(self, session: Session, tokens: list[int]) -> None:
        call = session.call
        if call is None or (writing := self._writing.get(call)) is None:
            return
        writing.unsent += tokens
        self._time(writing, len(tokens))
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

    def _time(self, writing: _Writing, tokens: int) -> None:
        speeds, session, now_s = writing.generator.speeds, writing.session, self._ledger.loop.time()
        speeds.came(tokens, now_s)
        if not writing.first_s:
            writing.first_s = now_s
            speeds.began(now_s - writing.began_s)
        else:
            writing.tokens += tokens
        if session.finish:
            speeds.ended(now_s - writing.first_s, writing.tokens)

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

"""Models for the gateway and for `splitnet chat`: a plan, its deployment, and the tokenizer that belongs to it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from splitnet import channel
from splitnet.client import AsyncClient
from splitnet.errors import BadInput, BadModel, NotFound
from splitnet.gateway.answering import ServedModel
from splitnet.gateway.tokenizing import TextTokenizer
from splitnet.generation import TextModel
from splitnet.plan import Plan
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["ModelSource", "OpenModel", "open_model", "open_tokenizer"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """`name` "": the deployment's. `tokenizer` None: where the plan says that the model was read from."""

    plan: Path
    name: str = ""
    deployment: str = ""
    tokenizer: Path | None = None
    chat_template: Path | None = None

    @classmethod
    def parse(cls, argument: str, deployment: str = "", tokenizer: Path | None = None, chat_template: Path | None = None) -> ModelSource:
        """PLAN, or NAME=PLAN."""
        name, equals, path = argument.partition("=")
        if equals and not Path(argument).exists():
            return cls(Path(path), name, deployment, tokenizer, chat_template)
        return cls(Path(argument), "", deployment, tokenizer, chat_template)


@dataclass(frozen=True, slots=True)
class OpenModel:
    """`served` as clients ask for it; `client` is to be closed."""

    served: ServedModel
    client: AsyncClient


async def open_model(source: ModelSource, timeout_s: float = 30.0) -> OpenModel:
    """Raises BadPlan, NotFound where the plan is not deployed, NodeUnavailable, BadModel for the tokenizer, or BadInput for a model that makes no text."""
    plan = Plan.load(source.plan)
    name = source.deployment or await _deployment_of(plan, timeout_s)
    client = AsyncClient(plan.ingress.address, name, timeout_s=timeout_s)
    try:
        await client.connect()
        if client.text is None:
            raise BadInput(f"deployment {name!r} is of no model that makes text", remedy="plan it with `splitnet plan hf:... --generate`")
        tokenizer = open_tokenizer(client.text, source)
    except BaseException:
        await client.close()
        raise
    return OpenModel(ServedModel(source.name or name, client, client.text, tokenizer, int(time.time())), client)


def open_tokenizer(model: TextModel, source: ModelSource) -> TextTokenizer:
    """Raises BadModel, also for a tokenizer that is of another model."""
    place = source.tokenizer or Path(model.tokenizer.removeprefix("hf:"))
    if source.tokenizer is None and (not model.tokenizer or not place.is_dir()):
        raise BadModel(
            f"the model's tokenizer stands in {model.tokenizer!r}, which is no directory here"
            if model.tokenizer
            else "the plan does not say where the model's tokenizer is",
            remedy="name the model's directory: --tokenizer DIR (tokenizer.json, tokenizer_config.json)",
        )
    tokenizer = TextTokenizer(place, source.chat_template)
    if tokenizer.vocabulary > model.vocabulary:
        raise BadModel(
            f"the tokenizer in {str(place)!r} has {tokenizer.vocabulary} tokens, the deployed model {model.vocabulary}: it belongs to another model",
            remedy="name the directory of the model that is deployed: --tokenizer DIR",
        )
    return tokenizer


async def _deployment_of(plan: Plan, timeout_s: float) -> str:
    """The name under which the plan is deployed; where only one is there, whatever its plan: it may have been updated since."""
    address = plan.ingress.address
    async with channel.open_channel(address) as connection:
        with channel.translated(address):
            reply = await channel.stub(connection).Describe(pb.DescribeRequest(), timeout=timeout_s)
    named = [status.name for status in reply.deployments if status.plan_sha256 == plan.sha256]
    texts = sorted({status.name for status in reply.deployments if status.HasField("generating")})
    if named or len(texts) == 1:
        return named[0] if named else texts[0]
    raise NotFound(
        f"this plan is not deployed at {address}" + (f", which serves {', '.join(map(repr, texts))} by other plans" if texts else ""),
        node=reply.name,
        remedy="run `splitnet deploy` with it" + (", or say --deployment NAME to use what is there" if texts else ""),
    )

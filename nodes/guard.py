"""Who may call what: one table, and the interceptor that applies it to every call of every service on a node's port.

A call that does not stand in the table is refused. Whoever speaks plaintext is LOCAL and may do everything: plaintext is this machine only, or was asked for with --insecure.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio

from nodes.callers import Caller, Callers, set_caller
from nodes.logs import Log
from splitnet.channel import abort_with
from splitnet.errors import NotPermitted, SplitnetError
from splitnet.security.addresses import Plaintext
from splitnet.security.audit import AuditLog
from splitnet.security.certificates import CertificateFacts, read_facts
from splitnet.security.credentials import Access, access_in_context
from splitnet.security.policy import Limits, Policy
from splitnet.security.roles import LOCAL, Identity, Role

__all__ = ["RULES", "Guard", "Rule"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]"

_NODE = "/splitnet.rpc.v1.Node/"
_HEALTH = "/grpc.health.v1.Health/"
_TOKEN_KEY = "authorization"
_NAME_KEY = "splitnet-node"  # who sends, by its own words: they must be true
_REFUSALS_PER_S = 10  # that the audit log takes; how many more there were stands in the next line


@dataclass(frozen=True, slots=True)
class Rule:
    """`audited`: each call, and not only a refused one, stands in the audit log."""

    roles: frozenset[Role]
    audited: bool = False


def _rule(*roles: Role, audited: bool = False) -> Rule:
    return Rule(frozenset({*roles, Role.LOCAL}), audited)


_ALL = (Role.NODE, Role.OPERATOR, Role.CLIENT, Role.OBSERVER, Role.GUEST)

#: The table. A guest with a token has the token's role here.
RULES: Mapping[str, Rule] = {
    _NODE + "Describe": _rule(Role.NODE, Role.OPERATOR, Role.CLIENT, Role.OBSERVER),
    _NODE + "Load": _rule(Role.OPERATOR, audited=True),
    _NODE + "Offer": _rule(Role.OPERATOR, audited=True),
    _NODE + "Gather": _rule(Role.OPERATOR, audited=True),
    _NODE + "Give": _rule(Role.NODE),  # and only what an operator has offered to that node
    _NODE + "Activate": _rule(Role.NODE, Role.OPERATOR, audited=True),  # a node: an ingress mends what it has lost
    _NODE + "Switch": _rule(Role.NODE, Role.OPERATOR, audited=True),  # a node: an ingress mends what it has lost
    _NODE + "Unload": _rule(Role.NODE, Role.OPERATOR, audited=True),  # a node: an ingress mends what it has lost
    _NODE + "Watch": _rule(Role.OPERATOR),
    _NODE + "SetPolicy": _rule(Role.OPERATOR, audited=True),
    _NODE + "Release": _rule(Role.OPERATOR, audited=True),
    _NODE + "Run": _rule(Role.OPERATOR, Role.CLIENT),
    _NODE + "Forward": _rule(Role.NODE),
    _NODE + "Heartbeat": _rule(Role.NODE, Role.OPERATOR, Role.CLIENT),
    _NODE + "Probe": _rule(Role.NODE, Role.OPERATOR),
    _NODE + "Measure": _rule(Role.OPERATOR, audited=True),
    _HEALTH + "Check": _rule(*_ALL),
    _HEALTH + "Watch": _rule(*_ALL),
    _HEALTH + "List": _rule(*_ALL),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _rule(*_ALL),
}


class Guard(grpc.aio.ServerInterceptor):
    """`policy` may be replaced at any time: `apply` ends what it no longer permits."""

    def __init__(self, access: Access, audit: AuditLog, log: Log) -> None:
        self.policy = Policy()
        self._access = access
        self._audit = audit
        self._log = log
        self._callers = Callers()
        self._open: dict[Context, tuple[Caller, CertificateFacts | None, str]] = {}
        self._refusals, self._refusals_since_s, self._unlisted = 0, 0.0, 0

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        return handler if handler is None else self._guarded(handler_call_details.method, handler)  # None: no such call

    async def apply(self, policy: Policy | None = None) -> int:
        """Takes a new policy, and ends the calls that are not permitted any more: a revoked or expired certificate or token. How many."""
        self.policy = self.policy if policy is None else policy
        ended = 0
        for context, (caller, facts, token) in list(self._open.items()):
            try:
                if facts is not None:
                    self._check_certificate(facts)
                if token:
                    self.policy.token(token, time.time())
            except NotPermitted as error:
                ended += 1
                self._log.warning("call ended", who=caller.who, error=error.message)
                # The first is how gRPC's abort returns; the others come where the far side has gone already.
                with contextlib.suppress(grpc.aio.AbortError, grpc.aio.UsageError, grpc.aio.InternalError):
                    await abort_with(context, error)
        return ended

    # ------------------------------------------------------------------------------------------------------------------ a call

    def _guarded(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        streams = bool(handler.request_streaming), bool(handler.response_streaming)
        kind, make = _KINDS[streams]
        inner: Callable[[Any, Context], Any] = getattr(handler, kind)

        if inspect.isasyncgenfunction(inner):

            async def yielding(request: Any, context: Context) -> Any:
                caller = await self._enter(method, context)
                try:
                    async for reply in inner(request, context):
                        yield reply
                except BaseException as error:
                    await self._leave(method, context, caller, error)
                    raise
                await self._leave(method, context, caller, None)

            return make(yielding, handler.request_deserializer, handler.response_serializer)

        async def returning(request: Any, context: Context) -> Any:
            caller = await self._enter(method, context)
            try:
                reply = await inner(request, context)
            except BaseException as error:
                await self._leave(method, context, caller, error)
                raise
            await self._leave(method, context, caller, None)
            return reply

        return make(returning, handler.request_deserializer, handler.response_serializer)

    async def _enter(self, method: str, context: Context) -> Caller:
        """Aborts the call unless its caller may make it."""
        peer = context.peer()
        identity, facts, token = LOCAL, None, ""
        try:
            if not isinstance(self._access, Plaintext):
                facts = _certificate(context)
                identity = facts.identity
                self._check_certificate(facts)
                token = _bearer(context)
            caller = self._caller(identity, token, peer)
            self._check_rule(method, caller)
            if identity.role is Role.NODE:
                _check_sender(identity, context)
        except NotPermitted as error:
            await self._refused(method, str(identity), peer, error)
            await abort_with(context, error)
        access_in_context(self._access)
        set_caller(caller)
        self._open[context] = caller, facts, token
        return caller

    async def _leave(self, method: str, context: Context, caller: Caller, error: BaseException | None) -> None:
        self._open.pop(context, None)
        if not RULES[method].audited:
            return
        result = "ok"
        if error is not None:
            result = f"failed: {context.details() or error!r}"  # abort has put our message there
        await asyncio.shield(asyncio.to_thread(self._append, caller.who, caller.peer, method, " ".join(caller.notes), result))

    def _caller(self, identity: Identity, token: str, peer: str) -> Caller:
        if not token:
            limits = (
                self.policy.limits.get(identity.name, self.policy.limits.get("", Limits())) if identity.role is Role.CLIENT else Limits()
            )
            return Caller(identity, peer, limits=limits, usage=self._callers.usage(identity.uri))
        found = self.policy.token(token, time.time())
        return Caller(
            Identity(identity.cluster, found.role, identity.name),
            peer,
            token=found.name,
            deployments=found.deployments,
            limits=found.limits,
            usage=self._callers.usage(f"token {found.sha256}"),
        )

    def _check_certificate(self, facts: CertificateFacts) -> None:
        if isinstance(self._access, Plaintext):
            return
        own = self._access.identity
        if facts.identity.cluster != own.cluster:
            raise NotPermitted(f"{facts.identity} belongs to cluster {facts.identity.cluster}, this node to {own.cluster}")
        if facts.serial in self.policy.revoked:
            raise NotPermitted(f"the certificate {facts.serial} of {facts.identity} was revoked", remedy="ask the operator for another")
        facts.check_now("your certificate")

    def _check_rule(self, method: str, caller: Caller) -> None:
        rule = RULES.get(method)
        if rule is None:
            raise NotPermitted(f"{method} stands in no rule of this node, so nobody may call it", remedy="add it to nodes.guard.RULES")
        role = caller.identity.role
        if role not in rule.roles:
            allowed = ", ".join(sorted(rule.roles - {Role.LOCAL}))
            raise NotPermitted(
                f"{caller.who} may not call {method.rpartition('/')[2]}", remedy=f"use credentials of one of these roles: {allowed}"
            )

    # --------------------------------------------------------------------------------------------------------------- in the log

    async def _refused(self, method: str, who: str, peer: str, error: SplitnetError) -> None:
        """At most so many lines a second: whoever knocks must not fill the disk."""
        self._log.warning("refused", call=method, who=who, peer=peer, error=error.message)
        now = time.monotonic()
        if now - self._refusals_since_s >= 1:
            self._refusals, self._refusals_since_s = 0, now
        self._refusals += 1
        if self._refusals > _REFUSALS_PER_S:
            self._unlisted += 1
            return
        more, self._unlisted = self._unlisted, 0
        result = f"refused: {error.message}" + (f" (and {more} more refusals before)" if more else "")
        await asyncio.to_thread(self._append, who, peer, method, "", result)

    def _append(self, who: str, peer: str, method: str, what: str, result: str) -> None:
        try:
            self._audit.append(who=who, came_from=peer, act=method.rpartition("/")[2], what=what, result=result)
        except SplitnetError as error:
            self._log.error("not in the audit log", who=who, call=method, what=what, result=result, error=error.message)


_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., grpc.RpcMethodHandler[Any, Any]]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def _certificate(context: Context) -> CertificateFacts:
    """Of the peer; gRPC has verified that an authority of ours signed it. Raises NotPermitted."""
    said: Mapping[str, Any] = context.auth_context()
    version = [bytes(value) for value in said.get("ssl_tls_version", ())]
    if version and version != [b"TLSv1.3"]:
        raise NotPermitted(f"TLS 1.3 is needed, this is {version[0].decode(errors='replace')}")
    pem = [bytes(value) for value in said.get("x509_pem_cert", ())]
    if len(pem) != 1:
        raise NotPermitted(
            "no certificate came with the connection", remedy="connect with the credentials that `splitnet certs issue` makes"
        )
    return _facts(pem[0])


@functools.lru_cache(1024)
def _facts(pem: bytes) -> CertificateFacts:
    return read_facts(pem, "the certificate of the connection")


def _metadata(context: Context, key: str) -> str:
    pairs = context.invocation_metadata() or ()
    return next((value for name, value in pairs if name == key and isinstance(value, str)), "")


def _bearer(context: Context) -> str:
    """The token that came along; empty for none. Raises NotPermitted for another kind of authorization."""
    value = _metadata(context, _TOKEN_KEY)
    if not value:
        return ""
    kind, _, token = value.partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        raise NotPermitted("authorization: expected `Bearer TOKEN`", remedy="give the token that `splitnet token create` has printed")
    return token.strip()


def _check_sender(identity: Identity, context: Context) -> None:
    """A node speaks in its own name only."""
    said = _metadata(context, _NAME_KEY)
    if said and said != identity.name:
        raise NotPermitted(
            f"{identity} says that it is node {said!r}",
            remedy="give each node the certificate of its own name, the one in plan and cluster file",
        )

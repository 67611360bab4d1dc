"""How a deployment stands: which generations of it there are, where, and which of them takes the requests. Asked of the nodes, which alone
know; whoever starts from a part of them finds the rest by the plans that these hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from splitnet.cluster import Cluster
from splitnet.errors import BadPlan, NotFound, ProtocolError
from splitnet.installation import used_nodes
from splitnet.node_status import NodeStatus, status_of
from splitnet.plan import NodeRef, Plan

__all__ = ["Generation", "Survey", "take_survey"]

_ROUNDS = 4  # nodes, those of the plans that they hold, and where these have gone


@dataclass(frozen=True)
class Generation:
    """`holders`: addresses of the nodes that have it loaded. `shards`: by stage, as far as a node said."""

    number: int
    plan: Plan
    state: str
    share: float
    shards: Mapping[str, str]
    holders: frozenset[str]
    answered: int = 0
    unanswered: int = 0

    @property
    def whole(self) -> bool:
        """Whether every node of its plan has it."""
        return {node.address for node in used_nodes(self.plan)} <= self.holders


@dataclass(frozen=True)
class Survey:
    """`statuses` by address: of every node that was asked."""

    name: str
    statuses: Mapping[str, NodeStatus] = field(repr=False)
    generations: Mapping[int, Generation]

    def in_state(self, *states: str) -> Generation | None:
        return next((g for g in sorted(self.generations.values(), key=lambda g: -g.number) if g.state in states), None)

    @property
    def active(self) -> Generation | None:
        return self.in_state("active")

    @property
    def concerned(self) -> list[str]:
        """Addresses of the nodes that know of this deployment."""
        return [address for address, status in self.statuses.items() if status.generations(self.name)]

    @property
    def next_number(self) -> int:
        known = (d.generation for status in self.statuses.values() for d in status.generations(self.name))
        return max(known, default=0) + 1

    @property
    def next_term(self) -> int:
        """Of the next switch: see `Families.switch` of the nodes."""
        return max((d.term for status in self.statuses.values() for d in status.generations(self.name)), default=0) + 1

    def require_active(self) -> Generation:
        """Raises NotFound where nothing of that name takes requests."""
        if (active := self.active) is not None:
            return active
        there = sorted({d.name for status in self.statuses.values() for d in status.deployments if d.state != "moved"})
        silent = [status.name or status.address for status in self.statuses.values() if status.error]
        raise NotFound(
            f"nothing is deployed under the name {self.name!r}; there are: {', '.join(there) or 'none'}"
            + (f" (nodes that do not answer: {', '.join(silent)})" if silent else ""),
            remedy="deploy it first, without --update; or say where it is (--cluster), where none of the plan's nodes has it",
        )

    def of_plan(self, plan: Plan) -> Generation | None:
        return next((g for g in self.generations.values() if g.plan.sha256 == plan.sha256), None)


async def take_survey(name: str, nodes: Iterable[NodeRef] | Cluster) -> Survey:
    """Asks these nodes, and those that they name. One that does not answer stands in `statuses` with its error. Raises ProtocolError for a
    node that holds what is no plan."""
    members = nodes.nodes if isinstance(nodes, Cluster) else nodes
    todo = {member.address: NodeRef(member.name, member.address) for member in members}
    statuses: dict[str, NodeStatus] = {}
    plans: dict[int, Plan] = {}
    for _ in range(_ROUNDS):
        for status in await status_of(todo.values(), plans=True):
            statuses[status.address] = status
        todo = {}
        for status in statuses.values():
            for held in status.generations(name):
                if held.plan_json and held.generation not in plans:
                    plans[held.generation] = _plan(name, status, held.plan_json)
                found = used_nodes(plans[held.generation]) if held.generation in plans else []
                if held.moved_to:
                    found.append(NodeRef("", held.moved_to))
                todo |= {node.address: node for node in found if node.address not in statuses}
        if not todo:
            break
    return Survey(name, statuses, {number: _generation(name, number, plan, statuses) for number, plan in plans.items()})


def _plan(name: str, status: NodeStatus, plan_json: str) -> Plan:
    try:
        return Plan.from_json(plan_json)
    except BadPlan as error:
        raise ProtocolError(
            f"the plan of {name!r} cannot be read: {error.message}", node=status.name, remedy="run the same version of splitnet everywhere"
        ) from None


def _generation(name: str, number: int, plan: Plan, statuses: Mapping[str, NodeStatus]) -> Generation:
    """Its state is what its ingress says, where calls go; what another node says, where the ingress is silent."""
    held = {
        address: d
        for address, status in statuses.items()
        for d in status.generations(name)
        if d.generation == number and d.state != "moved"
    }
    at_ingress = held.get(plan.ingress.address)
    word = at_ingress or next(iter(held.values()))
    shards = {stage: sha256 for d in held.values() for stage, sha256 in d.shards.items()}
    return Generation(
        number,
        plan,
        word.state,
        word.share,
        shards,
        frozenset(held),
        word.answered if at_ingress else 0,
        word.unanswered if at_ingress else 0,
    )

"""With pytest-xdist: what its controller and its workers tell each other beside tests, and in which order groups go."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker

from harness.core import gpus
from harness.core.records import Case
from harness.run.shards import longest_first

if TYPE_CHECKING:
    import pytest

    from harness.plugin.collector import Collector
    from harness.plugin.state import State

hookimpl = HookimplMarker("pytest")
CASE_FIELDS = (4, 6)  # model, method, [dataset, protocol,] metric, device
CARD = "harness_card"  # to a worker: the place among the cards that it may take
WHOLE = "harness_whole"  # from the first worker: with --shard, the plan before it was cut
FIRST = "gw0"


class Controller:
    """Registered in the process that hands tests to workers."""

    def __init__(self, state: State, collector: Collector) -> None:
        self.state, self.collector = state, collector
        self.cards: dict[str, int] = {}  # the place among the cards that each living worker may take

    @hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """The place among the cards that a worker may take; one that replaces a dead one takes its."""
        self.cards[node.gateway.id] = place = min(set(range(len(self.cards) + 1)) - set(self.cards.values()))
        node.workerinput[CARD] = place

    @hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """The first worker's node ids are the selected plan."""
        if not self.collector.opened:
            named = [name for name in map(case_id, ids) if name.endswith(("/cpu", "/cuda"))]
            plan = {case.id: case for case in (*self.state.plan, *self.state.invariants)} if named else {}
            self.state.select(plan[name] for name in named if name in plan)
            self.collector.begin(node.config)

    @hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Keep the cases of one model and method on one worker, so that each is loaded and quantized once.

        xdist's own `loadgroup` writes the group into node ids, which pytest 9.2 no longer lets it do.
        """
        if config.option.dist != "load":
            return None  # the user chose otherwise
        from xdist.scheduler import LoadScopeScheduling  # local: only where xdist runs

        scheduling = LoadScopeScheduling(config, log)
        scheduling.workqueue = LongestFirst(lambda: longest_first(self.state.selected))
        scheduling._split_scope = group_of
        return scheduling

    @hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """With --shard: the plan before it was cut, as the first worker tells it at its end."""
        self.cards.pop(node.gateway.id, None)
        if whole := getattr(node, "workeroutput", {}).get(WHOLE):
            self.state.learn_whole([Case(**item) for item in whole])


class Worker:
    """Registered in a worker."""

    def __init__(self, state: State, given: Mapping[str, Any]) -> None:
        self.state, self.given = state, given

    @hookimpl
    def pytest_collection_finish(self) -> None:
        """Cases that need a card leave this process its own, before anything that computes is started."""
        place = self.given[CARD]  # beyond the cards that there are the controller refuses the session
        if any(case.device == "cuda" for case in self.state.selected) and place < len(gpus.cuda_devices()):
            os.environ[gpus.VISIBLE] = gpus.entry(place, os.environ.get(gpus.VISIBLE))

    @hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tell the controller the plan before it was cut."""
        if self.state.whole and self.given["workerid"] == FIRST:
            output: dict[str, Any] = vars(session.config)["workeroutput"]
            output[WHOLE] = [case.told() for case in self.state.whole]


class LongestFirst(OrderedDict[str, Any]):
    """xdist's queue of groups, taken from in the order that `order` gives when the first is taken; others come last."""

    def __init__(self, order: Callable[[], Sequence[str]]) -> None:
        super().__init__()
        self.order = order
        self.places: dict[str, int] | None = None

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        """The next group to hand out."""
        if self.places is None:
            self.places = {group: place for place, group in enumerate(self.order())}
        places = self.places
        name = min(self, key=lambda group: places.get(group, len(places)))
        return name, self.pop(name)


def case_id(nodeid: str) -> str:
    """The case's id within a node id: between the first '[' and the last ']' (xdist appends '@group')."""
    inside, bracket, _ = nodeid.partition("[")[2].rpartition("]")
    return inside if bracket else ""


def group_of(nodeid: str) -> str:
    """Model, method and device of a measured case's node id; the node id itself for any other test."""
    fields = case_id(nodeid).split("/")
    return "/".join((*fields[:2], fields[-1])) if len(fields) in CASE_FIELDS else nodeid

"""Shards: every case in exactly one, alike everywhere, of about equal cost."""

import heapq
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.errors import BadSpecification
from harness.core.options import Shard, parse_shard
from harness.core.records import Case
from harness.run.shards import METHODS, OTHER_METHOD, billions, costs, cut, longest_first, partition, plan_digest

METRICS = ("memory.storage", "perplexity", "perplexity.delta", "latency.prefill")
MODELS = ("gpt2", "olmo-1b", "hub:org/Big-8B", "path:mine")


def a_plan(models: tuple[str, ...] = MODELS, methods: int = 5) -> list[Case]:
    return [
        Case(
            model,
            f"m{number}",
            "lee" if "perplexity" in metric else "",
            "chunk:512" if "perplexity" in metric else "",
            metric,
            "cpu",
        )
        for model in models
        for number in range(methods)
        for metric in METRICS
    ]


cases = st.lists(
    st.builds(
        Case,
        st.sampled_from(MODELS),
        st.sampled_from(("nf4", "fp4", "fp32")),
        st.sampled_from(("", "lee")),
        st.sampled_from(("chunk:512", "half:512")),
        st.sampled_from(METRICS),
        st.just("cpu"),
    ),
    unique=True,
    max_size=40,
)


@given(cases, st.integers(1, 12))
def test_every_case_is_in_exactly_one_shard_in_plan_order(plan: list[Case], count: int) -> None:
    shards = partition(plan, count)
    assert len(shards) == count
    assert sorted((case for shard in shards for case in shard), key=plan.index) == plan
    for shard in shards:
        assert [plan.index(case) for case in shard] == sorted(plan.index(case) for case in shard)


def test_groups_stay_whole_while_they_fit_a_share() -> None:
    plan = a_plan(("gpt2",), methods=8)
    for shard in partition(plan, 4):
        for group in {case.group for case in shard}:
            assert sum(case.group == group for case in shard) == len(METRICS)


def test_a_group_above_a_share_is_cut() -> None:
    plan = a_plan(("gpt2",), methods=1)
    assert sorted(map(len, partition(plan, 3))) == [1, 1, 2]


def test_no_shard_is_dearer_than_a_share_and_the_dearest_piece() -> None:
    plan = a_plan(methods=15)
    price = dict(zip(plan, costs(plan), strict=True))
    for count in (2, 3, 7, 16):
        share = sum(price.values()) / count
        loads = [sum(price[case] for case in shard) for shard in partition(plan, count)]
        assert max(loads) <= 4 / 3 * max(share, max(price.values()))


def test_the_cut_is_the_same_in_another_process() -> None:
    code = "from tests.run.test_sharding import *; print([[c.id for c in s] for s in partition(a_plan(), 5)])"
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert "gpt2" in told.pop()


def test_dear_groups_are_handed_out_first_and_a_reference_before_those_that_wait_for_it() -> None:
    plan = [case for case in a_plan(methods=2) if case.metric != "perplexity.delta" or case.method == "m1"]
    plan = [case._replace(reference="m0") for case in plan]
    order = longest_first(plan)
    assert set(order) == {case.group for case in plan}
    assert [group.partition("/")[0] for group in order[:4:2]] == ["hub:org%2FBig-8B", "olmo-1b"]
    assert all(order.index(f"{model}/m0/cpu") < order.index(f"{model}/m1/cpu") for model in ("gpt2", "olmo-1b"))


def test_methods_are_weighed_as_the_kept_session_measured_them() -> None:
    kept = json.loads((Path(__file__).parents[2] / "studies" / "scale" / "costs.json").read_text())["seconds"]
    total = {method: sum(seconds.values()) for method, seconds in kept.items()}
    assert METHODS.keys() == total.keys()
    for method, weight in METHODS.items():
        assert weight == pytest.approx(total[method] / total["fp32"], abs=0.03), method
    assert pytest.approx(statistics.median(METHODS.values()), abs=0.03) == OTHER_METHOD


def test_handing_out_ends_within_grahams_bound() -> None:
    plan = a_plan(methods=7)
    price: dict[str, float] = {}
    for case, seconds in zip(plan, costs(plan), strict=True):
        price[case.group] = price.get(case.group, 0.0) + seconds
    for devices in (1, 2, 5, 13):
        free = [0.0] * devices
        for group in longest_first(plan):
            heapq.heappush(free, heapq.heappop(free) + price[group])
        assert max(free) <= sum(price.values()) / devices + max(price.values())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gpt2", 0.124),
        ("olmo-1b", 1.0),
        ("hub:org/Llama-3.1-8B", 8.0),
        ("hub:org/opt-350m@abc", 0.35),
        ("path:mine", 1.0),
        ("smollm2-135m", 0.135),
    ],
)
def test_a_name_says_the_size(name: str, size: float) -> None:
    assert billions(name) == pytest.approx(size)


def test_a_group_loads_once_and_a_pass_runs_once() -> None:
    plan = [case for case in a_plan(("gpt2",), methods=1) if "perplexity" in case.metric]
    first, second = costs(plan)
    assert second < first / 10


def test_cutting_leaves_one_dear_case_alone() -> None:
    assert cut([(9.0, 0), (1.0, 1), (1.0, 2), (1.0, 3)], 2.0) == [[(9.0, 0)], [(1.0, 1), (1.0, 2)], [(1.0, 3)]]


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/2/3", ""])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(BadSpecification, match=re.escape(f"'{text}' is no shard: write I/N")):
        parse_shard(text)


def test_a_shard_reads_as_written() -> None:
    assert parse_shard("3/16") == Shard(3, 16)
    assert str(Shard(3, 16)) == "3/16"


def test_digests_tell_plans_apart() -> None:
    plan = a_plan()
    assert plan_digest(plan) == plan_digest(list(plan))
    assert plan_digest(plan) != plan_digest(plan[1:])

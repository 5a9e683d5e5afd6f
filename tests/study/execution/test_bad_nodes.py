"""A node is bad if trials fail there that succeed elsewhere."""

from __future__ import annotations

import pytest

from study.execution.bad_nodes import bad_nodes, left_out
from trainables.results import Attempt, Cause


def on(node: str, cause: Cause | None, to_step: int = 0, **fields: str) -> Attempt:
    ended = None if cause is None else 1.0
    return Attempt(began=0, ended=ended, nodes=node.split("+"), devices=1, cause=cause, to_step=to_step, **fields)


LOST, DONE = on("a", "infrastructure"), on("b", "complete", 9)


@pytest.mark.parametrize(
    ("attempts", "bad"),
    [
        ({"1": [LOST, DONE], "2": [LOST, DONE]}, {"a": ["1", "2"]}),
        ({"1": [LOST, DONE]}, {}),  # bad luck
        ({"1": [LOST, LOST, LOST, DONE], "2": [DONE]}, {}),  # one trial's word
        ({"1": [LOST, on("b", "infrastructure")], "2": [LOST, on("b", "infrastructure")]}, {}),  # no better there
        ({"1": [LOST, on("b", "infrastructure", 5)], "2": [LOST, on("c", "preempted", 3)]}, {"a": ["1", "2"]}),
        ({"1": [LOST, on("a", "complete")], "2": [LOST, on("a+b", "complete")]}, {}),  # it came further there, too
        ({"1": [DONE, LOST], "2": [DONE, LOST]}, {}),  # not later
        ({"1": [on("a", "preempted"), DONE], "2": [on("a", "bug"), DONE], "3": [on("a", "queued"), DONE]}, {}),
        ({"1": [on("a", "infrastructure", 5), on("b", None, 9)], "2": [LOST, DONE]}, {}),  # it still runs
        ({key: [on("a+b", "infrastructure"), on("c", "complete", 9)] for key in "12"}, {}),  # which one?
        (
            {key: [on("b+a", "infrastructure", failed_on="a"), DONE] for key in "12"},
            {"a": ["1", "2"]},
        ),
        (
            {key: [LOST, on("b", "infrastructure", 2), on("c", "complete", 9)] for key in "12"},
            {"a": ["1", "2"], "b": ["1", "2"]},
        ),
    ],
)
def test_who_is_bad(attempts: dict[str, list[Attempt]], bad: dict[str, list[str]]) -> None:
    assert bad_nodes(attempts) == bad


def test_the_last_node_stays() -> None:
    bad = {"host a": ["1", "2"], "host b": ["1", "2", "3"], "gone c": ["1", "2"]}
    assert left_out(bad, ["a", "b", "d"]).keys() == {"b", "a"}
    assert left_out(bad, ["a", "b"]) == {"b": "3 trials failed on host b and came further elsewhere: 1, 2, 3"}
    assert left_out(bad, ["a"]) == {}
    assert left_out({"gone c": ["1", "2"]}, ["a", "b"]) == {}, "it is not there"

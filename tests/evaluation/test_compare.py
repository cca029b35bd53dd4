"""Figures beside each other, with their errors."""

import json
import math
import statistics
from collections.abc import Sequence

import pytest

from elsa_lightning.evaluation import Score, difference, table, to_dict
from elsa_lightning.evaluation.compare import mean_error


def accuracy(right: Sequence[float], name: str = "task", first: int = 0) -> Score:
    parts = {(place, "hash"): value for place, value in enumerate(right, first)}
    return Score(name, "acc", statistics.mean(right), mean_error(right), len(right), parts, f"how of {name}")


DENSE, SPARSE = [1.0, 1, 1, 0, 1, 0, 1, 1], [1.0, 1, 0, 0, 1, 0, 0, 1]


def test_a_difference_on_the_same_items_has_the_error_of_the_differences() -> None:
    found = difference(accuracy(SPARSE), accuracy(DENSE))
    changes = [s - d for s, d in zip(SPARSE, DENSE, strict=True)]
    assert found.how == "paired" and found.value == pytest.approx(statistics.mean(changes))
    assert found.error == pytest.approx(statistics.stdev(changes) / math.sqrt(len(changes)))
    same = difference(accuracy(DENSE), accuracy(DENSE))
    assert (same.value, same.error) == (0, 0)


def test_a_difference_on_other_items_has_the_root_of_the_summed_squares() -> None:
    dense, sparse = accuracy(DENSE, first=100), accuracy(SPARSE)
    found = difference(sparse, dense)
    assert found.how == "independent" and dense.error and sparse.error
    assert found.error == pytest.approx(math.sqrt(dense.error**2 + sparse.error**2))
    assert difference(sparse, Score("task", "acc", 0.5, None, 8)).error is None


def test_one_item_has_no_error() -> None:
    assert mean_error([1.0]) is None
    assert difference(accuracy([1.0]), accuracy([0.0])).error is None


def test_the_mean_over_tasks_counts_each_alike_and_adds_their_errors() -> None:
    dense = [accuracy(DENSE, "a"), accuracy(DENSE[:4], "b")]
    sparse = [accuracy(SPARSE, "a"), accuracy(SPARSE[:4], "b")]
    *single, mean = to_dict(sparse, dense)
    assert mean["name"] == "mean of 2" and mean["count"] == 12
    assert mean["value"] == pytest.approx((single[0]["value"] + single[1]["value"]) / 2)
    errors = [row["difference"]["error"] for row in single]
    assert mean["difference"]["error"] == pytest.approx(math.hypot(*errors) / 2)
    assert mean["difference"]["how"] == "paired"
    json.dumps([*single, mean])


def test_the_table_says_which_errors_are_paired_and_how_each_figure_was_measured() -> None:
    text = Score("text", "perplexity", 20.0, 0.5, 10, protocol="text, 10 segments of 64 tokens, no BOS, float32")
    other = Score("text", "perplexity", 18.0, 0.5, 10, protocol=text.protocol)
    shown = table([text, accuracy(SPARSE)], [other, accuracy(DENSE)])
    lines = shown.splitlines()
    assert lines[0].split() == ["items", "dense", "sparse", "difference"]
    assert " ".join(lines[1].split()) == "text perplexity 10 18.000 ± 0.500 20.000 ± 0.500 +2.000 ± 0.707*"
    assert "-0.2500 ± 0.1637" in lines[2] and "*" not in lines[2]
    assert "item by item (paired)" in shown and "* not paired: the root of the summed squares" in shown
    assert "text: text, 10 segments of 64 tokens, no BOS, float32" in shown and "task: how of task" in shown
    assert max(map(len, lines)) <= 100
    alone = table([accuracy(SPARSE)])
    assert "dense" not in alone and "paired" not in alone

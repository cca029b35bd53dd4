"""The projection solves its argmin problem, exactly and for any input."""

import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elsa_lightning import Unstructured
from elsa_lightning.sets.base import WholePoints
from elsa_lightning.sets.unstructured import AT_ONCE


@dataclass(frozen=True)
class Keep(Unstructured):
    """So many entries of each matrix, rather than a fraction."""

    sparsity: float = 0.0
    scope: Literal["model", "tensor", "row"] = "tensor"
    entries: int = 1

    def kept(self, entries: int) -> int:
        return self.entries


def unstructured(v: Tensor, importance: Tensor | None, kept: int) -> Tensor:
    (mask,) = Keep(entries=kept).support(WholePoints([(v, importance)]))
    return mask.view(v.shape)


SPECIAL = [0.0, 1.0, -1.0, 2.0, -2.0, 1e-42, 1e30, math.inf]
values = st.one_of(st.sampled_from(SPECIAL), st.floats(-3, 3, width=32))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    shape = draw(st.sampled_from([(1, 1), (3, 5), (4, 4), (2, 3, 4)]))
    n = math.prod(shape)
    v = torch.tensor(draw(st.lists(values, min_size=n, max_size=n))).view(shape)
    f = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1e-40]), min_size=n, max_size=n))).view(shape)
    return v, draw(st.sampled_from([None, f])), draw(st.integers(1, shape[-2] * shape[-1]))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_exactly_k_of_each_matrix_survive_and_they_are_the_best(case: tuple[Tensor, Tensor | None, int]) -> None:
    v, importance, kept = case
    mask = unstructured(v, importance, kept)
    for index in range(v.shape[0] if v.dim() == 3 else 1):
        f = torch.ones_like(v) if importance is None else importance
        one_v, one_f, one_mask = ((t[index] if t.dim() == 3 else t).flatten() for t in (v, f, mask))
        score = [
            (float(a.abs() * b.sqrt()), float(a.abs()), -i) for i, (a, b) in enumerate(zip(one_v, one_f, strict=True))
        ]
        score = [(-math.inf if math.isnan(s) else s, m, i) for s, m, i in score]
        if any(s == -math.inf for s, _, _ in score):
            continue  # 0 · inf has no rank
        expected = sorted(range(len(score)), key=lambda i: score[i], reverse=True)[:kept]
        assert set(one_mask.nonzero().flatten().tolist()) == set(expected)


def test_minimises_the_weighted_distance_over_all_supports() -> None:
    generator = torch.Generator().manual_seed(0)
    v, f = torch.randn(2, 4, generator=generator), torch.rand(2, 4, generator=generator)
    costs = {
        support: float((f * v * v).flatten()[[i for i in range(8) if i not in support]].sum())
        for support in itertools.combinations(range(8), 3)
    }
    best = min(costs, key=costs.__getitem__)
    assert tuple(unstructured(v, f, 3).flatten().nonzero().flatten().tolist()) == best


def test_is_idempotent_and_the_identity_inside_the_set() -> None:
    v = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    z = v * unstructured(v, None, 20)
    assert torch.equal(z * unstructured(z, None, 20), z)
    assert torch.equal(z * unstructured(z, None, 30), z)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, 100), (0.5, 50), (0.9, 10), (0.999, 1), (0.014, 99), (0.016, 98)])
def test_the_sparsity_is_counted_per_matrix(sparsity: float, kept: int) -> None:
    points = WholePoints([(torch.randn(10, 10), None), (torch.randn(3, 20, 5), torch.rand(3, 20, 5))])
    matrix, experts = Unstructured(sparsity, scope="tensor").support(points)
    assert int(matrix.sum()) == kept
    assert experts.view(3, 100).sum(dim=1).tolist() == [kept] * 3


@st.composite
def tied_points(draw: st.DrawFn) -> tuple[list[tuple[Tensor, Tensor]], int]:
    few = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 2.0])
    points = [
        (
            torch.tensor(draw(st.lists(few, min_size=a * b, max_size=a * b))).view(a, b),
            torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=a * b, max_size=a * b))).view(a, b),
        )
        for a, b in [(3, 4), (2, 5), (4, 2)]
    ]
    return points, draw(st.integers(0, 29))


@settings(max_examples=200, deadline=None)
@given(tied_points(), st.sets(st.integers(0, 2)))
def test_one_budget_for_all_tensors_keeps_the_largest_scores_or_without_f_the_largest_relative_ones(
    case: tuple[list[tuple[Tensor, Tensor]], int], without: set[int]
) -> None:
    full, zeros = case
    points = [(v, None if index in without else importance) for index, (v, importance) in enumerate(full)]
    entries = []
    for v, importance in points:
        score = v.abs() if importance is None else v.abs() * importance.sqrt()
        if without:
            score = score / score.double().square().mean().sqrt().float().clamp_min(1e-30)
        elif not score.any():
            return  # keeps the common share: below
        entries += zip(score.flatten().tolist(), v.abs().flatten().tolist(), strict=True)
    if any(not v.any() for v, _ in points):
        return
    guesses: dict[Hashable, Tensor] = {}
    for _ in range(2):  # what the first search found may only save time
        whole = WholePoints(points)
        whole.guesses, whole.unweighted = guesses, False
        masks = list(Unstructured(zeros / 30, scope="model", floor=0.0).support(whole))
        best = sorted(range(30), key=lambda i: (*entries[i], -i), reverse=True)[: 30 - zeros]
        assert set(torch.cat([mask.flatten() for mask in masks]).nonzero().flatten().tolist()) == set(best)


def test_a_second_moment_that_appears_later_is_used() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [(torch.randn(20, 20, generator=generator), s * torch.rand(20, 20, generator=generator)) for s in (1, 9)]
    guesses: dict[Hashable, Tensor] = {}
    for importances in (False, True, True, False):
        points = WholePoints([(v, f if importances else None) for v, f in tensors])
        alone = [mask.clone() for mask in Unstructured(0.8).support(points)]
        points.guesses, points.unweighted = guesses, False
        for mask, expected in zip(Unstructured(0.8).support(points), alone, strict=True):
            assert torch.equal(mask, expected)


def test_one_budget_leaves_more_where_few_entries_carry_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.ones(20, 20) + 0.01 * torch.randn(20, 20, generator=generator)
    uneven = torch.randn(20, 20, generator=generator) ** 5
    points = WholePoints([(even, None), (uneven, None)])
    even_mask, uneven_mask = Unstructured(0.5, scope="model").support(points)
    assert int(even_mask.sum() + uneven_mask.sum()) == 400 and int(even_mask.sum()) > 300


def test_by_default_all_tensors_share_one_budget_and_none_keeps_less_than_a_twentieth_of_the_common_share() -> None:
    generator = torch.Generator().manual_seed(0)
    uneven = torch.randn(40, 50, generator=generator) ** 15
    even, between = torch.ones(20, 50), torch.randn(2, 10, 50, generator=generator)
    points = WholePoints(
        [(uneven, None), (even * (1 + 1e-3 * torch.rand(20, 50, generator=generator)), None), (between, None)]
    )
    for sparsity in (0.5, 0.9, 0.99):
        assert Unstructured(sparsity) == Unstructured(sparsity, "model")
        kept = [int(mask.sum()) for mask in Unstructured(sparsity).support(points)]
        assert sum(kept) == 4000 - round(sparsity * 4000)
        least = 0.05 * (1 - sparsity)
        assert kept[0] == pytest.approx(least * 2000, abs=1) or sparsity != 0.9  # a few entries are most of it
        assert all(count >= least * size - 1e-6 for count, size in zip(kept, (2000, 1000, 1000), strict=True))
        free = [int(mask.sum()) for mask in Unstructured(sparsity, floor=0.0).support(points)]
        assert sum(free) == sum(kept) and free[0] <= kept[0]


def test_what_has_no_scores_keeps_the_common_share() -> None:
    """Squared gradients of 0, as of an expert that no token was sent to, say nothing of importance."""
    generator = torch.Generator().manual_seed(0)
    v, importance = torch.randn(3, 20, 50, generator=generator), torch.rand(3, 20, 50, generator=generator)
    importance[1] = 0
    other = torch.randn(20, 50, generator=generator), torch.rand(20, 50, generator=generator)
    experts, matrix = Unstructured(0.9).support(WholePoints([(v, importance), other]))
    kept = [int(mask.sum()) for mask in (*experts.view(3, 20, 50), matrix)]
    assert sum(kept) == 400 and kept[1] == 100
    largest = v[1].abs().flatten().topk(100).indices.sort().values
    assert torch.equal(experts.view(3, -1)[1].nonzero().flatten(), largest)


def test_an_expert_that_saw_few_tokens_keeps_less_but_not_less_than_its_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    v, importance = torch.randn(3, 20, 50, generator=generator), torch.rand(3, 20, 50, generator=generator)
    seen = importance * torch.tensor([1.0, 0.5, 1e-6]).view(3, 1, 1)
    (mask,) = Unstructured(0.9).support(WholePoints([(v, seen)]))
    kept = mask.view(3, -1).sum(dim=1).tolist()
    assert sum(kept) == 300 and kept[0] > kept[1] > kept[2] == 5


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope must be 'tensor', 'row' or 'model', got 'layer'"):
        Unstructured(0.5, scope="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [(1.0, "in \\[0, 1\\), got 1.0$"), (-0.1, "got -0.1"), (90, "for 90 % give 0.9"), (math.nan, "got nan")],
)
def test_a_sparsity_out_of_range_is_refused(sparsity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Unstructured(sparsity)


def test_relaxing_goes_from_what_is_cut_at_once_to_the_set() -> None:
    assert Unstructured(0.9).relaxed(0) == Unstructured(AT_ONCE)
    assert AT_ONCE < Unstructured(0.9).relaxed(0.5).sparsity < 0.9
    assert Unstructured(0.9).relaxed(1) == Unstructured(0.9)
    for tightness in (0, 0.5, 1):
        assert Unstructured(0.6).relaxed(tightness) == Unstructured(0.6)

"""The projection solves its argmin problem, exactly and for any input."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elsa_lightning import Unstructured
from elsa_lightning.constraints import Point
from elsa_lightning.projections import unstructured

SPECIAL = [0.0, 1.0, -1.0, 2.0, -2.0, 1e-42, 1e30, math.inf]
values = st.one_of(st.sampled_from(SPECIAL), st.floats(-3, 3, width=32))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    shape = draw(st.sampled_from([(1, 1), (3, 5), (4, 4), (2, 3, 4)]))
    n = math.prod(shape)
    v = torch.tensor(draw(st.lists(values, min_size=n, max_size=n))).view(shape)
    f = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1e-40]), min_size=n, max_size=n))).view(shape)
    return v, draw(st.sampled_from([None, f])), draw(st.integers(0, shape[-2] * shape[-1]))


@settings(max_examples=300, deadline=None)
@given(cases())
def test_exactly_k_of_each_matrix_survive_and_they_are_the_best(case: tuple[Tensor, Tensor | None, int]) -> None:
    v, importance, kept = case
    mask = unstructured(v, importance, kept)
    for index in range(v.shape[0] if v.dim() == 3 else 1):
        f = torch.ones_like(v) if importance is None else importance
        one_v, one_f, one_mask = ((t[index] if t.dim() == 3 else t).flatten() for t in (v, f, mask))
        score = [(float(a * a * b), float(a.abs()), -i) for i, (a, b) in enumerate(zip(one_v, one_f, strict=True))]
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
    points = [Point("a", torch.randn(10, 10), None), Point("experts", torch.randn(3, 20, 5), torch.rand(3, 20, 5))]
    matrix, experts = Unstructured(sparsity).project(points)
    assert int(matrix.sum()) == kept
    assert experts.sum(dim=(1, 2)).tolist() == [kept] * 3


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [(1.0, "in \\[0, 1\\), got 1.0$"), (-0.1, "got -0.1"), (90, "for 90 % give 0.9"), (math.nan, "got nan")],
)
def test_a_sparsity_out_of_range_is_refused(sparsity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Unstructured(sparsity)


def test_relaxing_goes_from_everything_to_the_set() -> None:
    assert Unstructured(0.8).relaxed(0) == Unstructured(0.0)
    assert Unstructured(0.8).relaxed(0.5) == Unstructured(0.4)
    assert Unstructured(0.8).relaxed(1) == Unstructured(0.8)

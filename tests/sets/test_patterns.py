"""N:M, blocks, rows, budgets and other sets for other tensors: each against a brute force written here."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elsa_lightning import ADMM, NM, Block, ByPattern, Quantized, Unstructured
from elsa_lightning.errors import UserError
from elsa_lightning.layout import rows
from elsa_lightning.sets import Constraint
from elsa_lightning.sets.base import WholePoints
from tests.sets.mixed import states, train

SPECIAL = [0.0, 1.0, -1.0, 0.5, 1e-42, 1e30]


def masks(constraint: Constraint, *tensors: tuple[Tensor, Tensor | None], **of: Any) -> list[Tensor]:
    return [m.view(v.shape) for m, (v, _) in zip(constraint.support(WholePoints(tensors, **of)), tensors, strict=True)]


@st.composite
def matrices(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> tuple[Tensor, Tensor | None]:
    shape = draw(st.sampled_from(shapes))
    n = math.prod(shape)
    v = torch.tensor(draw(st.lists(st.sampled_from(SPECIAL), min_size=n, max_size=n))).view(shape)
    f = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=n, max_size=n))).view(shape)
    return v, draw(st.sampled_from([None, f]))


def best(v: list[float], f: list[float], n: int) -> set[int]:
    """Return the ``n`` places with the largest F v², then |v|, then the lowest index."""
    return set(sorted(range(len(v)), key=lambda i: (-abs(v[i]) * math.sqrt(f[i]), -abs(v[i]), i))[:n])


@settings(max_examples=200, deadline=None)
@given(matrices([(3, 8), (2, 2, 4), (1, 4)]), st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (1, 1)]))
def test_every_group_keeps_its_best(case: tuple[Tensor, Tensor | None], pattern: tuple[int, int]) -> None:
    (v, importance), (n, m) = case, pattern
    (mask,) = masks(NM(n, m), (v, importance))
    f = torch.ones_like(v) if importance is None else importance
    for a, b, kept in zip(v.reshape(-1, m), f.reshape(-1, m), mask.reshape(-1, m), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == best(a.tolist(), b.tolist(), n)


@settings(max_examples=50, deadline=None)
@given(matrices([(8, 3), (2, 4, 5)]))
def test_of_transposed_weights_groups_and_rows_run_along_the_input(case: tuple[Tensor, Tensor | None]) -> None:
    v, importance = case
    turned = (v.mT.contiguous(), None if importance is None else importance.mT.contiguous())
    for constraint in (NM(2, 4), Block(0.5, rows=2, columns=4), Unstructured(0.5, scope="row")):
        (mask,) = masks(constraint, case, transposed=[True])
        (other,) = masks(constraint, turned)
        if not isinstance(constraint, Block) or len(set(costs(turned, 2, 4))) == len(costs(turned, 2, 4)):
            assert torch.equal(mask, other.mT)


def costs(case: tuple[Tensor, Tensor | None], rows: int, columns: int) -> list[float]:
    v, importance = case
    cost = (v.abs() * (1 if importance is None else importance.sqrt())).square()
    return [
        float(cost[..., i : i + rows, j : j + columns].sum(dtype=torch.float32))
        for i in range(0, v.shape[-2], rows)
        for j in range(0, v.shape[-1], columns)
    ]


@settings(max_examples=100, deadline=None)
@given(matrices([(3, 5), (4, 4), (1, 7)]), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_the_costliest_blocks_survive_whole(case: tuple[Tensor, Tensor | None], sparsity: float) -> None:
    v, _ = case
    (mask,) = masks(Block(sparsity, rows=2, columns=3), case)
    each = [
        mask[i : i + 2, j : j + 3].float().mean().item()
        for i in range(0, v.shape[0], 2)
        for j in range(0, v.shape[1], 3)
    ]
    assert set(each) <= {0.0, 1.0}
    cost, kept = costs(case, 2, 3), max(1, len(each) - round(sparsity * len(each)))
    expected = set(sorted(range(len(cost)), key=lambda i: (-cost[i], i))[:kept])
    assert {i for i, m in enumerate(each) if m} == expected


def test_a_block_minimises_the_distance_over_all_supports() -> None:
    generator = torch.Generator().manual_seed(0)
    v, f = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator)
    (mask,) = masks(Block(0.5, rows=2, columns=2), (v, f))
    places = [(i, j) for i in (0, 2) for j in (0, 2, 4)]

    def cost(kept: tuple[tuple[int, int], ...]) -> float:
        z = torch.zeros_like(v)
        for i, j in kept:
            z[i : i + 2, j : j + 2] = v[i : i + 2, j : j + 2]
        return float((f * (z - v).square()).sum())

    assert float((f * (v * mask - v).square()).sum()) == pytest.approx(
        min(map(cost, itertools.combinations(places, 3)))
    )


@settings(max_examples=100, deadline=None)
@given(matrices([(3, 5), (2, 3, 4)]), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_every_row_keeps_its_best(case: tuple[Tensor, Tensor | None], sparsity: float) -> None:
    v, importance = case
    (mask,) = masks(Unstructured(sparsity, scope="row"), case)
    n = v.shape[-1]
    f = torch.ones_like(v) if importance is None else importance
    for a, b, kept in zip(v.view(-1, n), f.view(-1, n), mask.view(-1, n), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == best(a.tolist(), b.tolist(), max(1, n - round(sparsity * n)))


@pytest.mark.parametrize(
    "constraint",
    [
        Unstructured(0.5, scope="row"),
        NM(2, 4),
        Block(0.5, rows=2, columns=4),
        Quantized(4),
        Quantized(4, None, NM(2, 4)),
        Quantized(3, 4, Unstructured(0.5, scope="row")),
    ],
    ids=str,
)
def test_pieces_in_which_tensors_are_processed_change_nothing(
    constraint: Constraint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of transposed weights, whose groups run across the rows, nor of kernels and stacks of matrices."""
    whole, _ = train(constraint)
    monkeypatch.setattr(rows, "PIECE_ON_CPU", 40)
    pieces, _ = train(constraint)
    for (name, p), q in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        assert torch.equal(p, q), name


def several(seed: int = 0) -> list[tuple[Tensor, None]]:
    """Return tensors of which a budget for all together empties one and spares another."""
    generator = torch.Generator().manual_seed(seed)
    heavy = torch.randn(20, 20, generator=generator).pow(5)
    return [(heavy, None), (torch.full((10, 30), 1.0), None), (torch.randn(30, 10, generator=generator), None)]


@pytest.mark.parametrize(("floor", "ceiling"), [(0.05, 1.0), (0.0, 0.12), (0.08, 0.12), (0.1, 0.1)])
def test_no_tensor_is_emptied_beyond_its_floor_or_spared_beyond_its_ceiling(floor: float, ceiling: float) -> None:
    found = masks(Unstructured(0.9, "model", floor=floor, ceiling=ceiling), *several())
    shares = [float(mask.float().mean()) for mask in found]
    assert all(floor - 1e-6 <= share <= ceiling + 1e-6 for share in shares)
    assert sum(int(mask.sum()) for mask in found) == 100
    free = [float(mask.float().mean()) for mask in masks(Unstructured(0.9, "model"), *several())]
    assert not all(floor <= share <= ceiling for share in free)  # or nothing was tested


def test_a_ceiling_below_what_a_ramp_begins_with_is_raised_to_that() -> None:
    constraint = Unstructured(0.9, "model", ceiling=0.12)
    for tightness, kept in ((0.0, 300), (0.5, 200), (1.0, 100)):
        found = masks(constraint.relaxed(tightness), *several())
        assert sum(int(mask.sum()) for mask in found) == kept
    assert all(float(mask.float().mean()) <= 0.12 for mask in found)


def test_bounds_that_do_not_bind_change_nothing() -> None:
    free, bounded = (
        masks(Unstructured(0.5, "model", **bounds), *several()) for bounds in ({"floor": 0.0}, {"floor": 1e-3})
    )
    assert all(torch.equal(a, b) for a, b in zip(free, bounded, strict=True))


def test_a_profile_prunes_deeper_blocks_more_and_as_much_in_all() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["embed.proj", *(f"layers.{i}.mlp.0.weight" for i in range(5))]
    tensors = [(torch.randn(20, 10 * (1 + i % 2), generator=generator), None) for i in range(6)]
    found = masks(Unstructured(0.6, "tensor", depth=0.2), *tensors, names=names)
    zeros = [1 - float(mask.float().mean()) for mask in found]
    assert zeros[1:] == sorted(zeros[1:])
    assert zeros[5] - zeros[1] == pytest.approx(0.4, abs=0.01)
    total = sum(v.numel() for v, _ in tensors)
    assert sum(int(mask.sum()) for mask in found) == pytest.approx(0.4 * total, abs=3)
    flat = masks(Unstructured(0.6, "tensor", depth=0.0), *tensors, names=names)
    assert {round(1 - float(mask.float().mean()), 3) for mask in flat} == {0.6}


def test_a_profile_too_steep_for_its_sparsity_keeps_as_many_in_all() -> None:
    """The last blocks would lose more than all they have: they keep next to nothing, and the others make up for it."""
    tensors = [(torch.randn(40, 50, generator=torch.Generator().manual_seed(i)), None) for i in range(5)]
    found = masks(Unstructured(0.9, "tensor", depth=0.4), *tensors, names=[f"layers.{i}" for i in range(5)])
    assert sum(int(mask.sum()) for mask in found) == pytest.approx(1000, abs=5)
    assert 1 <= int(found[-1].sum()) <= 2


def test_a_number_of_weights_is_kept() -> None:
    shapes = {"a": torch.Size((20, 20)), "b": torch.Size((10, 30))}
    constraint = Unstructured(keep=70, scope="model").sized(shapes)
    tensors = [(torch.randn(20, 20), None), (torch.randn(10, 30), None)]
    assert sum(int(mask.sum()) for mask in masks(constraint, *tensors)) == 70
    with pytest.raises(UserError, match="keep=701 weights of the 700 that are constrained"):
        Unstructured(keep=701).sized(shapes)
    for bytes_each, said in ((None, "2,800"), ({"a": 2, "b": 2}, "1,400"), ({"a": 4, "b": 2}, "2,200")):
        with pytest.raises(UserError, match=f"keep_bytes=3000 bytes of the {said} that are constrained"):
            Unstructured(keep_bytes=3000).sized(shapes, bytes_each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_weights_of_so_many_bytes_are_kept(scope: Any, dtype: torch.dtype) -> None:
    """Inside a grid its bits count; one pattern's budget is not another's."""

    def saved(constraint: Constraint) -> tuple[int, int]:
        a, b = (torch.nn.Parameter(torch.randn(40, 40).to(dtype)) for _ in "ab")
        optimizer = torch.optim.Adam([a, b], lr=0.0)
        admm = ADMM(optimizer, {"a": a, "b": b}, constraint, total_steps=2, prox="linearized")
        for _ in range(2):
            a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
            optimizer.step()
        admm.finish()
        return int((a != 0).sum()), int((b != 0).sum())

    each = dtype.itemsize
    assert sum(saved(Unstructured(keep_bytes=400 * each, scope=scope))) == 400
    budgets = {"a": Unstructured(keep_bytes=100 * each, scope=scope), "b": Unstructured(keep=300, scope=scope)}
    assert saved(ByPattern(budgets)) == (100, 300)
    assert sum(saved(Quantized(8, inside=Unstructured(keep_bytes=800, scope=scope)))) <= 800
    assert sum(saved(Quantized(4, inside=Unstructured(keep_bytes=800, scope=scope)))) > 800


def test_each_tensor_has_the_set_of_its_first_pattern() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["0.attn.q", "0.mlp.up", "1.attn.q", "1.mlp.up"]
    tensors = [(torch.randn(8, 8, generator=generator), None) for _ in names]
    both = ByPattern({"attn": NM(2, 4), "mlp|attn": Unstructured(0.75, "model")})
    both.check({name: v.shape for name, (v, _) in zip(names, tensors, strict=True)})
    found = masks(both, *tensors, names=names)
    attention = masks(NM(2, 4), tensors[0], tensors[2])
    mlp = masks(Unstructured(0.75, "model"), tensors[1], tensors[3])
    for mask, expected in zip(found, [attention[0], mlp[0], attention[1], mlp[1]], strict=True):
        assert torch.equal(mask, expected)
    assert not both.covers("head")
    with pytest.raises(UserError, match=r"no pattern of .* matches 'head'"):
        both.check({"head": torch.Size((4, 4))})
    with pytest.raises(UserError, match="'mlp' is the first match of no constrained tensor"):
        ByPattern({"attn": NM(2, 4), "mlp": NM(1, 4)}).check({"attn": torch.Size((4, 4))})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NM(0, 4), "n must be from 1 to m"),
        (lambda: NM(5, 4), "n must be from 1 to m"),
        (lambda: NM(2, 4).check({"w": torch.Size((4, 6))}), r"w has 6 inputs, which is no multiple of m=4.*ignore"),
        (lambda: NM(2, 4).check({"w": torch.Size((6, 4))}, ["w"]), r"w has 6 inputs"),
        (lambda: Block(1.0), r"fraction of zero blocks in \[0, 1\)"),
        (lambda: Block(0.5, rows=0), "1 or more"),
        (lambda: ByPattern({}), "sets is empty"),
        (lambda: ByPattern({"(": NM(2, 4)}), "no regular expression"),
        (lambda: Unstructured(), "sparsity .* or keep"),
        (lambda: Unstructured(0.5, keep=3), "one of the three"),
        (lambda: Unstructured(0.5, keep_bytes=3), "one of the three"),
        (lambda: Unstructured(keep_bytes=0.1), "keep_bytes must be a number of bytes, 1 or more"),
        (lambda: Unstructured(keep=0.5), "a fraction is sparsity"),
        (lambda: Unstructured(0.5, "row", floor=0.1), "floor and ceiling are for scope='model'"),
        (lambda: Unstructured(0.5, "model", floor=0.6), "must lie between"),
        (lambda: Unstructured(0.5, "row", depth=0.1), "depth is for scope='tensor'"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


SETS: dict[str, Constraint] = {
    "2:4": NM(2, 4), "1:4": NM(1, 4), "blocks": Block(0.75, 2, 4), "rows": Unstructured(0.75, "row"),
    "floor": Unstructured(0.9, "model", floor=0.05), "keep": Unstructured(keep=100),
    "depth": Unstructured(0.8, "tensor", depth=0.1),
    "mixed": ByPattern({"turned|kernels": NM(2, 4), "": Unstructured(0.75)}),
}  # fmt: skip


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("prox", ["linearized", "coupled"])
@pytest.mark.parametrize("name", SETS)
def test_training_ends_in_the_set_and_resumes_to_the_bit(name: str, prox: Any, state_dtype: Any) -> None:
    options = {"prox": prox, "state_dtype": state_dtype}
    model, admm = train(SETS[name], **options)
    resumed, _ = train(SETS[name], states(*train(SETS[name], stop=5, **options)), **options)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    transposed = [parameter == "turned.weight" for parameter in admm.tensors]
    rows = [(t.p.detach().reshape(t.part.shape), None) for t in admm.tensors.values()]
    kept = masks(admm.constraint, *rows, names=list(admm.tensors), transposed=transposed)
    for (x, _), mask in zip(rows, kept, strict=True):
        assert not x[~mask].any()
        assert x[mask].any()

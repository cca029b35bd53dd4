"""Selection by counting bits equals a sort, for any ties, pools and pieces."""

import itertools
import sys
import threading
from collections.abc import Collection, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout import rows
from elsa_lightning.layout.sharded import Part
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets.threshold import Scores, largest, largest_of_each

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "step_overhead"))

from counts import Counting, as_on_a_gpu

few = st.sampled_from([0.0, 1e-42, 0.25, 1.0, 3.0, float("inf")])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], bool, list[list[int]]]:
    matrices, ties, cuts = [], [], []
    for n in draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)):
        matrices.append(torch.tensor(draw(st.lists(few, min_size=n, max_size=n))))
        ties.append(torch.tensor(draw(st.lists(few, min_size=n, max_size=n))))
        cuts.append(sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}))
    return matrices, ties, draw(st.booleans()), cuts


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_the_largest_survive_wherever_the_tensors_are_cut(
    case: tuple[list[Tensor], list[Tensor], bool, list[list[int]]], data: st.DataObject
) -> None:
    matrices, ties, together, cuts = case
    sizes = [sum(map(len, matrices))] if together else list(map(len, matrices))
    kept = [data.draw(st.integers(1, size)) for size in sizes]
    pools = torch.zeros(len(matrices), dtype=torch.int64) if together else torch.arange(len(matrices))

    def scores(wanted: Collection[int] | None) -> list[Scores]:
        return [
            Scores(matrix[None, a:b], tie[None, a:b], index)
            for index, (matrix, tie, cut) in enumerate(zip(matrices, ties, cuts, strict=True))
            for a, b in itertools.pairwise(cut)
            if wanted is None or index in wanted
        ]

    expected, start = torch.zeros(sum(map(len, matrices)), dtype=torch.bool), 0
    for size, k in zip(sizes, kept, strict=True):
        score, tie = torch.cat(matrices)[start : start + size], torch.cat(ties)[start : start + size]
        best = sorted(range(size), key=lambda i: (-score[i], -tie[i], i))[:k]
        expected[[start + i for i in best]] = True
        start += size
    guesses: dict[Hashable, Tensor] = {}
    for _ in range(2):  # the second finds the thresholds of the first
        masks = largest(scores, pools, torch.tensor(kept), guesses=guesses)
        assert torch.equal(torch.cat([mask.flatten() for mask in masks]), expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.booleans(), st.data())
def test_a_stack_is_as_its_matrices(rows: int, n: int, in_places: bool, data: st.DataObject) -> None:
    score, tie = (
        torch.tensor(data.draw(st.lists(few, min_size=rows * n, max_size=rows * n))).view(rows, n) for _ in range(2)
    )
    kept = torch.tensor(data.draw(st.lists(st.integers(1, n), min_size=rows, max_size=rows)))
    pools, first = torch.arange(rows), torch.arange(rows) if in_places else 0

    def alone(wanted: Collection[int] | None) -> list[Scores]:
        return [Scores(score[row, None], tie[row, None], row) for row in range(rows) if wanted is None or row in wanted]

    expected = torch.cat(list(largest(alone, pools, kept)))
    guesses: dict[Hashable, Tensor] = {}
    for _ in range(2):
        (found,) = largest(lambda _: [Scores(score, tie, first)], pools, kept, guesses=guesses)
        assert torch.equal(found, expected)


def test_zeros_that_are_kept_are_counted_where_rows_of_a_stack_have_different_numbers() -> None:
    score = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0], [0.0] * 5])
    pools = torch.zeros(2, dtype=torch.int64)
    (mask,) = largest(lambda _: [Scores(score, score, 0)], pools, torch.tensor([6]))
    assert mask.tolist() == [[True] * 5, [True, False, False, False, False]]


def on_processes(count: int, find: Any) -> list[Any]:
    """Return what ``find(rank, add)`` returns on each of some processes; here they are threads."""
    barrier, given = threading.Barrier(count), [torch.empty(0)] * count

    def one(rank: int) -> Any:
        def add(t: Tensor) -> Tensor:
            given[rank] = t
            barrier.wait(60)
            total = torch.stack(given).sum(dim=0)
            barrier.wait(60)
            return t.copy_(total)

        try:
            return find(rank, add)
        except BaseException:
            barrier.abort()  # else the others would wait
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_equals_that_are_sharded_go_to_the_first_part_and_copies_count_once(
    case: tuple[list[Tensor], list[Tensor], bool, list[list[int]]], data: st.DataObject
) -> None:
    """Three processes hold parts of each matrix, some of them empty, or all hold all of it."""
    matrices, ties, together, _ = case
    sizes = [sum(map(len, matrices))] if together else list(map(len, matrices))
    kept = torch.tensor([data.draw(st.integers(1, size)) for size in sizes])
    pools = torch.zeros(len(matrices), dtype=torch.int64) if together else torch.arange(len(matrices))
    copied = [data.draw(st.booleans()) for _ in matrices]
    cuts = [[0, *sorted(data.draw(st.integers(0, len(m))) for _ in range(2)), len(m)] for m in matrices]

    def held(rank: int, index: int) -> slice:
        return slice(None) if copied[index] else slice(*cuts[index][rank : rank + 2])

    def find(rank: int, add: Any) -> list[list[Tensor]]:
        def scores(wanted: Collection[int] | None) -> Iterator[Scores]:
            for index in range(len(matrices)) if wanted is None else sorted(wanted):
                score, tie = (of[index][None, held(rank, index)].clone() for of in (matrices, ties))
                counts, order = (rank == 0, 0) if copied[index] else (True, rank)
                yield Scores(score, tie, index, counts, order)

        guesses: dict[Hashable, Tensor] = {}
        return [list(largest(scores, pools, kept, add, 3, guesses)) for _ in range(2)]

    def whole(_: object) -> Iterator[Scores]:
        yield from (Scores(s[None], t[None], i) for i, (s, t) in enumerate(zip(matrices, ties, strict=True)))

    expected = list(largest(whole, pools, kept))
    for rank, searches in enumerate(on_processes(3, find)):
        for masks in searches:
            for index, mask in enumerate(masks):
                assert torch.equal(mask, expected[index][:, held(rank, index)])


def test_noise_depends_on_the_place_in_the_whole_and_not_on_the_cut() -> None:
    shape, cpu = torch.Size((3, 10, 16)), torch.device("cpu")
    whole = Part(shape, (0, 0, 0)).noise(shape, slice(0, 30), 7, cpu).view(shape)
    rows = Part(shape, (1, 0, 0)).noise(torch.Size((2, 10, 16)), slice(0, 20), 7, cpu).view(2, 10, 16)
    columns = Part(shape, (0, 0, 8)).noise(torch.Size((3, 10, 8)), slice(5, 30), 7, cpu)
    assert torch.equal(rows, whole[1:])
    assert torch.equal(columns, whole.view(30, 16)[5:, 8:])
    flat = Part(shape, (), start=37).noise(torch.Size((100,)), slice(3, 90), 7, cpu)
    assert torch.equal(flat, whole.view(1, -1)[:, 40:127])
    for seed in (8, 7 + (1 << 32)):  # a seed has the step in its high bits
        other = Part(shape, (0, 0, 0)).noise(shape, slice(0, 30), seed, cpu)
        assert int((other.view(shape) == whole).sum()) < 3


def test_noise_is_even_in_every_bit() -> None:
    shape = torch.Size((512, 256))
    bits = Part(shape, (0, 0)).noise(shape, slice(0, 512), 3, torch.device("cpu"))
    for bit in range(32):
        share = float(((bits >> bit) & 1).float().mean())
        assert abs(share - 0.5) < 5 * 0.5 / shape.numel() ** 0.5


@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize(
    ("factors", "foretold"),
    [
        ((1.0,), True), ((0.95,), True), ((1.05,), True), ((0.1,), False), ((0.6,), False), ((10.0,), False),
        ((0.7, 0.85), True),
    ],
)  # fmt: skip
def test_former_thresholds_save_passes_where_they_foretell_the_next_and_change_nothing(
    factors: tuple[float, ...], foretold: bool, on_a_gpu: bool
) -> None:
    score = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)).abs()
    score[1, :50] = score[1, 50]  # equals
    pools, kept = torch.arange(3), torch.tensor([400, 3999, 1])
    made = 0

    def find(guesses: dict[Hashable, Tensor] | None, factor: float = 1.0) -> Tensor:
        nonlocal made

        def scores(_: object) -> Iterator[Scores]:
            nonlocal made
            made += 1
            yield Scores(score * factor, score, 0)

        made = 0
        return next(iter(largest(scores, pools, kept, guesses=guesses, of="these")))

    with as_on_a_gpu() if on_a_gpu else nullcontext():
        expected, guesses = find(None), {}
        assert made == (4 if on_a_gpu else 2)
        for factor in factors:
            find(guesses, factor)
        assert torch.equal(find(guesses), expected)
    assert made == ((3 if foretold else 5) if on_a_gpu else 1 if foretold else 3)  # a GPU keeps nothing from a pass


def test_what_is_held_a_matrix_at_a_time_is_what_is_found_in_passes() -> None:
    """With ties, matrices in several pieces, and stacks whose matrices keep different numbers of entries."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(100):
        pieces, kept = [], []
        for matrix in range(4):
            sizes = [int(n) for n in torch.randint(1, 40, (1 + trial % 3,), generator=generator)]
            for n in sizes:
                score = torch.randn(1, n, generator=generator)
                score = score.round() if trial % 2 else score
                pieces.append(Scores(score, torch.randint(-3, 4, (1, n), generator=generator).float(), matrix))
            kept.append(int(torch.randint(1, sum(sizes) + 1, (), generator=generator)))
        stack = torch.randint(3, (3, 20), generator=generator).float()
        pieces.append(Scores(stack, stack.flip(1), torch.tensor([6, 4, 5]) if trial % 2 else 4))
        ranks = torch.tensor([*kept, 3, 10, 20])

        def scores(_: object, pieces: list[Scores] = pieces) -> Iterator[Scores]:
            yield from (s._replace(score=s.score.clone(), tiebreak=s.tiebreak.clone()) for s in pieces)

        with as_on_a_gpu():
            found = list(largest_of_each(scores, ranks))
        wanted = list(largest(scores, torch.arange(7), ranks))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "constraint",
    [
        *(Unstructured(s, scope) for s in (0.7, 0.3) for scope in ("model", "tensor")),
        Unstructured(0.7, "tensor", depth=0.2),
    ],
)
def test_a_set_supports_the_same_on_a_gpu(constraint: Unstructured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE_ON_CPU", 500)  # so that matrices come in pieces
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{i}.weight" for i in range(4)]
    start = {name: torch.randn(40, 30, generator=generator) for name in names}

    def zeros() -> list[torch.Tensor]:
        parameters = {name: torch.nn.Parameter(start[name].clone()) for name in names}
        optimizer = torch.optim.Adam(parameters.values(), lr=0.01)
        ADMM(optimizer, parameters, constraint, total_steps=8, schedule=Schedule(interval=2))
        for _ in range(8):
            for p in parameters.values():
                p.grad = p.detach() + 0.1
            optimizer.step()
        return [p == 0 for p in parameters.values()]

    wanted = zeros()
    with as_on_a_gpu():
        assert all(torch.equal(one, other) for one, other in zip(zeros(), wanted, strict=True))


def test_a_host_waits_for_the_device_once_and_not_for_each_piece() -> None:
    score = torch.rand(2, 1000)
    pieces = [Scores(score[:, a : a + 100], score[:, a : a + 100], 0) for a in range(0, 1000, 100)]
    with as_on_a_gpu(), Counting() as counting:
        list(largest(lambda _: pieces, torch.arange(2), torch.tensor([10, 900])))
    histograms = counting.counts.names["bincount"]  # which is another operation on a GPU
    assert histograms == 30 and counting.counts.looks - histograms == 1


@pytest.mark.parametrize(("on_a_gpu", "share"), [(True, 0.02), (False, 0.02), (False, 0.5), (False, 1.0)])
def test_equals_in_one_matrix_do_not_have_the_others_looked_at_again(on_a_gpu: bool, share: float) -> None:
    score = torch.rand(5, 1 << 18, generator=torch.Generator().manual_seed(0))
    score[0 if share == 1 else 3, : int(share * (1 << 18))] = 2.0  # more than survive
    made = [0] * 5

    def scores(wanted: Collection[int] | None) -> Iterator[Scores]:
        for index in range(5) if wanted is None else wanted:
            made[index] += 1
            yield Scores(score[index, None], score[index, None], index)

    with as_on_a_gpu() if on_a_gpu else nullcontext():
        masks = torch.cat(list(largest(scores, torch.arange(5), torch.full((5,), 1000))))
    assert torch.equal(masks.sum(dim=1), torch.full((5,), 1000))
    equals = masks[0 if share == 1 else 3]
    assert equals.nonzero().max() == 999
    if on_a_gpu:  # three to find the threshold, one for the mask; of equals likewise, and one that counts them
        assert made == [4, 4, 4, 8, 4]
    elif share < 1:  # one to find the bin, one that keeps what is in it
        assert made == [2] * 5
    else:  # of which there is too much to keep it
        assert made == [9, 5, 5, 5, 5]


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_thousands_of_pools_have_their_own_thresholds(on_a_gpu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(1500, 40, generator=generator) * 10.0 ** torch.randint(-9, 9, (1500, 1), generator=generator)
    kept = torch.randint(1, 41, (1500,), generator=generator)
    places = score.abs().argsort(dim=1, descending=True).argsort(dim=1)
    pieces = [Scores(score[a:b], score[a:b], a) for a, b in ((0, 700), (700, 1500))]
    guesses: dict[Hashable, Tensor] = {}
    with as_on_a_gpu() if on_a_gpu else nullcontext():
        for _ in range(2):
            masks = largest(lambda _: pieces, torch.arange(1500), kept, guesses=guesses)
            assert torch.equal(torch.cat(list(masks)), places < kept[:, None])


def test_equals_that_are_many_at_first_and_few_of_all_are_not_forgotten() -> None:
    score = torch.rand(8, 1 << 18, generator=torch.Generator().manual_seed(0))
    score[0] = 2.0

    def scores(_: object) -> Iterator[Scores]:
        for index in range(8):
            yield Scores(score[index, None], score[index, None], index)

    masks = torch.cat(list(largest(scores, torch.zeros(8, dtype=torch.int64), torch.tensor([1000]))))
    assert masks.sum() == 1000 and masks[0, :1000].all()


def test_what_is_close_at_first_and_not_later_is_not_forgotten() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(8, 1 << 18, generator=generator) / 2
    score[0] = 1 + torch.rand(1 << 18, generator=generator) / 100  # all near the threshold
    guesses: dict[Hashable, Tensor] = {}

    def find() -> Tensor:
        def scores(_: object) -> Iterator[Scores]:
            for index in range(8):
                yield Scores(score[index, None], score[index, None], index)

        pools = torch.zeros(8, dtype=torch.int64)
        return torch.cat(list(largest(scores, pools, torch.tensor([1000]), guesses=guesses)))

    assert torch.equal(find(), find()) and find().sum() == 1000

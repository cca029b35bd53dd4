"""The abilities of sets: iterating any number of times, tying entries across tensors, fixing values, a grain."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout.rows import Rows
from elsa_lightning.layout.sharded import Part, whole
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets import Constraint, Member, Point, Points, Tie, Tied
from elsa_lightning.sets.base import WholePoints

FORMS = ["linearized", "decoupled", "coupled", "feedback"]


def train(constraint: Constraint, prox: Any, steps: int = 40, **options: Any) -> tuple[dict[str, nn.Parameter], ADMM]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (12, 8), "gate": (12, 8), "down": (8, 12)}
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    targets = [torch.randn(shape, generator=generator) for shape in shapes.values()]
    optimizer = torch.optim.Adam(parameters.values(), lr=0.05)
    schedule = Schedule(interval=2, **({"ramp": 0.2, "frozen": 0.3} | options))
    admm = ADMM(optimizer, parameters, constraint, total_steps=steps, schedule=schedule, prox=prox)
    for _ in range(steps):
        optimizer.zero_grad()
        pairs = zip(parameters.values(), targets, strict=True)
        sum((p - t).square().sum() for p, t in pairs).backward()  # type: ignore[union-attr]
        optimizer.step()
    admm.finish()
    return parameters, admm


@dataclass(frozen=True)
class Itself(Unstructured):
    """The same set; it yields the masks tensor by tensor."""

    def support(self, points: Points) -> Iterator[Tensor]:
        for point in points:
            score = point.v.abs() if point.importance is None else point.v.abs() * point.importance.sqrt()
            yield score >= score.flatten().topk(self.kept(score.numel())).values[-1]


def test_a_set_made_of_another_sees_small_tensors_one_by_one() -> None:
    one, other = (train(kind(0.7, "tensor"), "linearized")[0] for kind in (Unstructured, Itself))
    assert all(torch.equal(p, other[name]) for name, p in one.items())


@dataclass(frozen=True)
class LooksAgain(Unstructured):
    """The same set; it reads its points before, backwards and in between."""

    def support(self, points: Points) -> Iterator[Tensor]:
        list(points)
        for mask in super().support(points):
            next(iter(points))
            yield mask
        list(reversed(list(points)))


@pytest.mark.parametrize("prox", FORMS)
def test_how_often_a_set_looks_changes_nothing(prox: Any) -> None:
    once, _ = train(Unstructured(0.7), prox)
    often, _ = train(LooksAgain(0.7), prox)
    for name, p in once.items():
        assert torch.equal(p, often[name])
    entries = sum(p.numel() for p in once.values())
    assert sum(int((p != 0).sum()) for p in once.values()) == entries - round(0.7 * entries)


@dataclass(frozen=True)
class Neurons(Tied):
    """Of 12 neurons so many stay: rows of up and gate, columns of down."""

    kept: int

    def ties(self, shapes: Mapping[str, torch.Size]) -> list[Tie]:
        return [Tie(12, self.kept, (Member("up", 0), Member("gate", 0), Member("down", 1)))]


@pytest.mark.parametrize("prox", FORMS)
def test_tied_entries_stay_or_go_together(prox: Any) -> None:
    parameters, _ = train(Neurons(5), prox)
    stays = parameters["up"].any(dim=1)
    assert int(stays.sum()) == 5
    assert torch.equal(stays, parameters["gate"].any(dim=1)) and torch.equal(stays, parameters["down"].any(dim=0))


def test_the_units_that_stay_are_the_best_of_all_choices() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"up": (12, 8), "gate": (12, 8), "down": (8, 12)}
    tensors = [(torch.randn(s, generator=generator), torch.rand(s, generator=generator)) for s in shapes.values()]
    up, gate, down = Neurons(3).support(WholePoints(tensors, list(shapes)))
    (u, fu), (g, fg), (d, fd) = tensors
    costs = (fu * u * u).sum(1) + (fg * g * g).sum(1) + (fd * d * d).sum(0)
    best = max(itertools.combinations(range(12), 3), key=lambda units: float(costs[list(units)].sum()))
    for mask, dim in ((up, 1), (gate, 1), (down, 0)):
        assert tuple(mask.all(dim=dim).nonzero().flatten().tolist()) == best
        assert torch.equal(mask.any(dim=dim), mask.all(dim=dim))


def test_equal_units_go_by_their_number_and_experts_are_units_too() -> None:
    @dataclass(frozen=True)
    class Experts(Tied):
        def ties(self, shapes: Mapping[str, torch.Size]) -> list[Tie]:
            return [Tie(4, 2, (Member("experts", 2),))]

    (mask,) = Experts().support(WholePoints([(torch.ones(4, 3, 5), None)], ["experts"]))
    assert mask.view(4, 15).all(dim=1).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("kept", "message"), [(13, "13 of 12 units"), (0, "0 of 12 units")])
def test_ties_that_cannot_be_are_refused(kept: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(Neurons(kept), "linearized")
    with pytest.raises(ValueError, match="gate is tied to up and is not constrained"):
        Neurons(3).check({"up": torch.Size((12, 8)), "down": torch.Size((8, 12))})


@dataclass(frozen=True)
class Grid(Constraint):
    """Every kept entry is a multiple of ``step``; half of them stay."""

    step: float = 0.25
    fixes_values = True

    def support(self, points: Points) -> Iterator[Tensor]:
        return Unstructured(0.5).support(points)

    def values(self, v: Tensor, point: Point) -> Tensor:
        return (v / self.step).round() * self.step


@pytest.mark.parametrize("prox", ["linearized", "feedback"])
@pytest.mark.parametrize("frozen", [0.0, 0.2])
def test_values_on_a_grid_are_exact_and_small_steps_are_not_lost(prox: Any, frozen: float) -> None:
    """Steps of 0.01 are far below the grid: rounded away one by one nothing would ever move."""
    generator = torch.Generator().manual_seed(2)
    p = nn.Parameter(torch.zeros(6, 8))
    target = torch.where(torch.rand(6, 8, generator=generator) < 0.5, 2.0, 0.0)
    with torch.no_grad():
        p.copy_(target / 2 + 0.01 * torch.rand(6, 8, generator=generator))
    optimizer = torch.optim.SGD([p], lr=0.005)
    admm = ADMM(optimizer, {"p": p}, Grid(), total_steps=400, prox=prox,
                schedule=Schedule(interval=4, ramp=0, frozen=frozen))  # fmt: skip
    for _ in range(400 - round(400 * frozen)):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()
    admm.finish()
    steps = p.detach() / 0.25
    assert torch.equal(steps, steps.round()) and int((p != 0).sum()) <= 24
    kept = target != 0
    assert float((p.detach() - target)[kept & (p != 0)].abs().max()) <= 0.25


def test_forms_that_keep_z_and_u_in_one_number_refuse_a_grid() -> None:
    with pytest.raises(ValueError, match=r"Grid fixes the values of kept weights.*use prox 'linearized'"):
        train(Grid(), "coupled")


def test_no_piece_cuts_the_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(50, 7)
    for grain in (1, 4, 8):
        rows = Rows(whole(x), x, grain)
        rows.limit = 70  # ten rows
        starts = [piece.rows.start for piece in rows.pieces()]
        assert all(start % grain == 0 for start in starts) and len(starts) > 4
        assert sum(piece.rows.stop - piece.rows.start for piece in rows.pieces()) == 50


@pytest.mark.parametrize("limit", [40, 400, 10**6])
@pytest.mark.parametrize("offsets", [(0, 0, 0), (2, 0, 0), (0, 4, 0), (0, 0, 8)])
def test_places_of_pieces_are_those_in_the_whole(offsets: tuple[int, ...], limit: int) -> None:
    shape = torch.Size((5, 10, 16))
    numbers = torch.arange(shape.numel()).view(shape)[tuple(slice(offset, None) for offset in offsets)]
    layout = Rows(Part(shape, offsets), numbers.contiguous())
    layout.limit, seen = limit, []
    for piece in layout.pieces():
        column, row, matrix = (layout.index(piece.rows, axis) for axis in (1, 0, 2))
        here = layout.take(numbers.contiguous(), piece.rows)
        assert torch.equal((matrix * 10 + row) * 16 + column, here)
        assert (piece.matrix, piece.matrices) == (int(matrix.min()), len(matrix.unique()))
        seen.append(here)
    assert torch.equal(torch.cat(seen), numbers.flatten(0, 1))


def test_a_set_sees_all_shapes_together() -> None:
    @dataclass(frozen=True)
    class Particular(Unstructured):
        def check(self, shapes: Mapping[str, torch.Size], transposed: Collection[str] = ()) -> None:
            raise ValueError(f"saw {sorted(shapes)}")

    with pytest.raises(ValueError, match=r"saw \['down', 'gate', 'up'\]"):
        train(Particular(0.5), "linearized")

"""When things happen in a run."""

import math

import pytest

from elsa_lightning.schedule import Schedule


@pytest.mark.parametrize(
    ("shape", "start", "middle"),
    [("constant", 2.0, 2.0), ("linear", 0.0, 1.0), ("cosine", 0.0, 1.0), ("exponential", 0.002, 2 * 10**-1.5)],
)
def test_the_penalty_reaches_its_value_at_the_freeze(shape: str, start: float, middle: float) -> None:
    schedule = Schedule(2.0, shape, frozen=0.2, ramp=0.1)  # type: ignore[arg-type]
    assert schedule.penalty_at(0, 1000) == pytest.approx(start)
    assert schedule.penalty_at(400, 1000) == pytest.approx(middle)
    assert schedule.penalty_at(800, 1000) == pytest.approx(2.0)
    assert schedule.penalty_at(900, 1000) == pytest.approx(2.0)
    values = [schedule.penalty_at(step, 1000) for step in range(801)]
    assert values == sorted(values)


def test_the_ramp_is_cubic_and_closes_before_the_freeze() -> None:
    schedule = Schedule(ramp=0.5, frozen=0.25)
    assert [schedule.tightness_at(step, 100) for step in (0, 25, 50, 80)] == pytest.approx([0, 1 - 0.5**3, 1, 1])
    assert Schedule(ramp=0.0).tightness_at(1, 100) == 1
    for total in range(1, 60):
        for frozen in (0.0, 0.3, 0.5):
            tight = Schedule(ramp=1 - frozen, frozen=frozen)
            assert tight.tightness_at(tight.freeze_step(total), total) == 1


def test_projections_come_at_the_first_step_every_interval_and_the_freeze() -> None:
    schedule = Schedule(interval=7, frozen=0.5)
    assert [step for step in range(1, 41) if schedule.projects_at(step, 40)] == [1, 7, 14, 20]
    assert [step for step in range(1, 21) if Schedule(interval=8, frozen=0).projects_at(step, 20)] == [1, 8, 16, 20]


@pytest.mark.parametrize(("total", "expected"), [(100, 1), (1000, 1), (4096, 8), (100_000, 32)])
def test_the_default_interval_follows_the_length_of_the_run(total: int, expected: int) -> None:
    schedule = Schedule(frozen=0.5)
    steps = [step for step in range(2, total) if schedule.projects_at(step, total)]
    assert steps[1] - steps[0] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": -1.0}, "penalty must be a finite number of 0 or more, got -1.0"),
        ({"penalty": math.nan}, "penalty must be .* got nan"),
        ({"shape": "quadratic"}, "penalty_schedule must be one of .*'cosine'.* got 'quadratic'"),
        ({"interval": 0}, "interval must be 1 or more optimizer steps, or None, got 0"),
        ({"ramp": 0.7, "frozen": 0.5}, "got ramp=0.7, frozen=0.5"),
        ({"frozen": 1.0, "ramp": 0.0}, "frozen below 1"),
        ({"ramp": -0.1}, "got ramp=-0.1"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)  # type: ignore[arg-type]

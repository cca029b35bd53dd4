"""A grid inside another set on several processes: as on one, and resumed to the bit in either phase."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import worker
from tests.distributed.test_strategies import EXACT, assert_close, assert_same, launch, load

GRID = {"bits": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("grids")
    worker.run(place, "one", "auto", **GRID)
    runs = [{"name": how, "how": how, **GRID} for how in ("ddp", "fsdp2")]
    runs += [{"name": f"fsdp2-{n}", "how": "fsdp2", "resume": f"fsdp2/{n}.ckpt", **GRID} for n in (4, 9)]
    status, said = launch(2, place, *runs)
    assert status == 0, said
    return place


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_find_the_grid_of_one(how: str, folder: Path) -> None:
    one, two = load(folder, "one"), load(folder, how)
    assert_close(one["weights"], two["weights"], EXACT)
    assert_close(one["state"], two["state"], EXACT)
    weights = one["weights"]["layers.0.weight"]
    levels = weights / one["state"]["layers.0.weight.elsa_numbers"].double()
    assert float((levels - levels.round()).abs().max()) == 0 and 1 < float(levels.abs().max()) <= 7


@pytest.mark.parametrize("step", [4, 9])
def test_a_sharded_run_goes_on_to_the_bit(step: int, folder: Path) -> None:
    whole, resumed = load(folder, "fsdp2"), load(folder, f"fsdp2-{step}")
    assert_same(whole["weights"], resumed["weights"])
    assert_same(whole["state"], resumed["state"])


def test_flat_slices_are_refused_early(tmp_path: Path) -> None:
    status, said = launch(2, tmp_path, {"name": "x", "how": "fsdp1", **GRID})
    assert status != 0 and "Quantized keeps 1 \u00d7" in said and "ModelParallelStrategy (FSDP2)" in said

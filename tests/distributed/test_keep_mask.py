"""KeepMask on two processes: the result of one process, no zero lost, and bit-identical when resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import worker
from tests.distributed.test_strategies import EXACT, ROUNDED, assert_close, assert_same, launch, load

STRATEGIES = ("ddp", "fsdp1", "fsdp2")
RUNS: dict[str, dict[str, Any]] = {
    "clipped": {"clip": 0.02},
    "accumulated": {"clip": 0.02, "accumulate": 2, "steps": 6},
    "mixed": {"clip": 0.02, "precision": "bf16-mixed", "dtype": "float32"},
    "8bit": {"clip": 0.02, "optimizer": "8bit", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("keep")
    two: list[dict[str, Any]] = []
    for name, options in RUNS.items():
        worker.run(place, f"one-{name}", "auto", keep=True, **options)
        two += [{"name": f"{how}-{name}", "how": how, "keep": True, **options} for how in STRATEGIES]
    for how in STRATEGIES:
        again = {"name": f"{how}-from-4", "how": how, "keep": True, **RUNS["clipped"]}
        two.append({**again, "resume": f"{how}-clipped/4.ckpt"})
    status, said = launch(2, place, *two)
    assert status == 0, said
    assert "5 tensors keep" in said
    return place


def sparse() -> dict[str, torch.Tensor]:
    """Return the masks that the runs begin with."""
    net = worker.Net(sparse=True)
    net.configure_model()
    names = ("layers.0.weight", "experts", "kernels.weight")
    return {name: net.get_parameter(name) != 0 for name in names}


@pytest.mark.parametrize("how", ["one", *STRATEGIES])
@pytest.mark.parametrize("name", RUNS)
def test_no_zero_is_lost_and_the_rest_trains(how: str, name: str, folder: Path) -> None:
    weights = load(folder, f"{how}-{name}")["weights"]
    for tensor, mask in sparse().items():
        assert not weights[tensor].view(mask.shape)[~mask].any()
        assert weights[tensor].view(mask.shape)[mask].all()


@pytest.mark.parametrize("how", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "mixed"])
def test_two_processes_make_what_one_makes_clipping_and_all(how: str, name: str, folder: Path) -> None:
    one, two = (load(folder, f"{which}-{name}")["weights"] for which in ("one", how))
    if how == "fsdp1":
        for weights in (one, two):  # it gets a gradient of 0 there, and none elsewhere
            del weights["unused.weight"]
        if name == "8bit":  # blocks begin elsewhere
            return
    exact = how != "fsdp1" and name != "8bit"
    assert_close(
        {n: p.float() for n, p in one.items()}, {n: p.float() for n, p in two.items()}, EXACT if exact else ROUNDED
    )


@pytest.mark.parametrize("how", STRATEGIES)
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_bit(how: str, folder: Path) -> None:
    whole, resumed = load(folder, f"{how}-clipped"), load(folder, f"{how}-from-4")
    assert_same(whole["weights"], resumed["weights"])
    assert_same(whole["state"], resumed["state"])

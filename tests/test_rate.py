"""The learning rate that a cut asks for: closed forms, and what it does to optimizers, schedules and resumed runs."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from elsa_lightning import ADMM, NM, ByPattern, CausalLM, ElsaCallback, Quantized, Unstructured
from elsa_lightning.cli import main
from elsa_lightning.errors import UserError
from elsa_lightning.rate import Damage, blocks, choose, doubt, peak
from elsa_lightning.selection import select
from elsa_lightning.sets import Constraint
from tests.callbacks import tiny
from tests.callbacks.tiny import assert_same_run, every_step, fit


@pytest.mark.parametrize("constraint", [Unstructured(0.75), NM(1, 4), Unstructured(0.5, "tensor"), Quantized(3, 8)])
def test_damage_is_what_the_projection_takes(constraint: Constraint) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 8, bias=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    admm = ADMM(torch.optim.Adam(model.parameters()), dict(model.named_parameters()), constraint, total_steps=4)
    damage = admm.damage()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert not admm.optimizer.state
    admm.finish()
    whole = torch.cat([p.flatten() for p in before.values()]).double()
    cut = whole - torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    assert damage.rms == pytest.approx(float(whole.square().mean().sqrt()), rel=1e-6)
    assert damage.share == pytest.approx(float(cut.square().sum() / whole.square().sum()), rel=1e-5)
    assert damage.depth == 2 and damage.inputs == pytest.approx((24 * 16 * 16 + 8 * 24 * 24) / (24 * 16 + 8 * 24))
    assert damage.rate == pytest.approx(damage.rms * damage.share * math.sqrt(2 / (damage.inputs * 2)))


def test_blocks_are_counted_whatever_is_in_them() -> None:
    torch.manual_seed(0)
    rates = []
    for copies in (1, 4):
        model = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(copies)])
        weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
        for p in weights.values():
            nn.init.constant_(p, 1.0)
        rates.append(ADMM(torch.optim.Adam(weights.values()), weights, Unstructured(0.5), total_steps=2).damage().rate)
    assert rates[0] == pytest.approx(2 * rates[1])
    assert blocks(["model.layers.0.q", "model.layers.0.experts.3.up", "model.layers.11.q"]) == 2
    assert blocks(["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.conv2"]) == 3
    assert blocks(["encoder.block.0.q", "decoder.block.0.q", "pooler"]) == 3


def test_inputs_of_a_transposed_layer_are_its_rows() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(nf=4, nx=32)
    parameters = select(nn.ModuleDict({"layer": layer})).parameters
    admm = ADMM(torch.optim.Adam(layer.parameters()), parameters, Unstructured(0.5), total_steps=2)
    assert admm.damage().inputs == 32


def test_weights_that_are_all_zero_ask_for_no_rate() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.Adam([p], lr=1e-3)
    damage = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=2).damage()
    assert damage == Damage(0.0, 0.0, 4, 1) and doubt(optimizer, damage) is None
    assert choose(optimizer, [], damage) == 1e-3


SCHEDULES = {
    "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 8),
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8, eta_min=0.005),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=0, min_lr=[0.004, 0.002]),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.02, 0.01], total_steps=10),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=3, cycle_momentum=False),
    "cyclic after constant": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2), SCHEDULES["cyclic"](o)], [2]
    ),
    "cyclic before constant": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [SCHEDULES["cyclic"](o), torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2)], [6]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_whole_schedule_is_scaled_for_every_group(name: str) -> None:
    def course(scale: float) -> list[list[float]]:
        one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([{"params": [one], "lr": 0.02}, {"params": [two], "lr": 0.01}])
        scheduler: Any = SCHEDULES[name](optimizer)
        foreign = torch.optim.lr_scheduler.CyclicLR(torch.optim.SGD([two], lr=1.0), 1.0, 5.0)
        if scale != 1:
            choose(optimizer, [foreign, scheduler], Damage(0.02 * scale, 1.0, 2, 1))
        assert foreign.base_lrs == [1.0] and foreign.max_lrs == [5.0], "of another optimizer"
        rates = []
        for _ in range(9):
            rates.append([group["lr"] for group in optimizer.param_groups] + scheduler.get_last_lr())
            optimizer.step()
            scheduler.step(*[1.0] * (name == "plateau"))
        return rates

    plain, scaled = torch.tensor(course(1)), torch.tensor(course(3))
    assert torch.allclose(scaled, 3 * plain, rtol=1e-6)
    assert float(scaled.max()) == pytest.approx(0.06, rel=1e-3)  # which is the peak that was chosen


def test_auto_is_the_same_as_giving_that_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto, callback = fit(tmp_path / "auto", every_step(tmp_path / "auto"), elsa={"learning_rate": "auto"})
    assert callback.admm is not None
    found = callback.admm.optimizer.param_groups[0]["initial_lr"]
    assert found != 3e-3
    monkeypatch.setitem(tiny.OPTIMIZERS, "given", lambda params: torch.optim.Adam(params, lr=found))
    given, _ = fit(tmp_path / "given", net={"optimizer": "given"})
    for a, b in zip(auto.parameters(), given.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("given", "logged"), [({}, 0.003), ({"learning_rate": "auto"}, "auto")])
def test_loggers_are_told_no_rate_that_was_not_taken(tmp_path: Path, given: dict[str, Any], logged: object) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, elsa=given, max_steps=2, logger=logger)
    assert yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())["optimizer/lr"] == logged


def test_a_resumed_run_keeps_the_rate_it_began_with(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    fit(whole, every_step(whole), elsa={"learning_rate": "auto"})
    fit(part, every_step(part), elsa={"learning_rate": "auto"}, resume=whole / "9.ckpt")
    assert_same_run(whole / "20.ckpt", part / "20.ckpt")


def test_a_rate_far_off_is_told_and_kept(tmp_path: Path) -> None:
    _, callback = fit(tmp_path, max_steps=2)
    assert callback.admm is not None
    optimizer = callback.admm.optimizer
    fits = Damage(1.0, peak(optimizer), 2, 1)
    for factor, word in ((0.1, "larger"), (10.0, "smaller"), (2.0, None), (0.5, None)):
        said = doubt(optimizer, replace(fits, rms=factor))
        assert (said is None) if word is None else (said is not None and f"10 times {word}" in said)
    assert peak(optimizer) == 3e-3


def test_rates_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a number belongs to the optimizer"):
        ElsaCallback(0.5, learning_rate=1e-3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="SGD"):
        fit(tmp_path, net={"optimizer": "sgd"}, elsa={"learning_rate": "auto"})
    p = nn.Parameter(torch.ones(4))
    sgd = torch.optim.SGD([p], lr=100.0)
    assert doubt(sgd, Damage(1.0, 0.5, 4, 1)) is None  # its rate says nothing of the size of a step


def test_sets_of_patterns_have_one_damage() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    named = dict(model.named_parameters())
    both = ByPattern({"0": Unstructured(0.5), "1": NM(2, 4)})
    found = ADMM(torch.optim.Adam(model.parameters()), named, both, total_steps=2).damage()
    parts = []
    for name, one in (("0.weight", Unstructured(0.5)), ("1.weight", NM(2, 4))):
        p = named[name]
        damage = ADMM(torch.optim.Adam([p]), {name: p}, one, total_steps=2).damage()
        parts.append((damage, float(p.detach().square().sum())))
    want = sum(d.share * weight for d, weight in parts) / sum(weight for _, weight in parts)
    assert found.share == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("given", [[], ["--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.001"]])
def test_the_command_line_chooses_unless_an_optimizer_is_given(
    tmp_path: Path, given: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    main([
        "fit", "--elsa.sparsity=0.6", "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}",
        "--trainer.logger=false", "--trainer.limit_val_batches=0", "--data.seq_len=32", "--data.batch_size=2", *given,
    ])  # fmt: skip
    said = "peak learning rate" in caplog.text
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    rate = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"][0]["initial_lr"]
    assert said != bool(given) and (rate == 0.001) == bool(given)
    module = CausalLM()
    module.configure_model()
    parameters = select(module).parameters
    damage = ADMM(torch.optim.Adam(parameters.values()), parameters, Unstructured(0.6), total_steps=2).damage()
    assert given or rate == pytest.approx(damage.rate, rel=1e-6)

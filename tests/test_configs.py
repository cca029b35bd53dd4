"""Every shipped configuration builds its run: trainer, module and data, without a network."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback, Unstructured
from elsa_lightning.cli import main
from elsa_lightning.training import ElsaCLI

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
FRAGMENTS = sorted((ROOT / "callbacks").glob("*.yaml"))

PUBLISHED = {  # sparsity, learning rate, λ (Lee et al., 2026, arXiv:2510.01650)
    "opt-125m-50": (0.5, 1e-5, 1e-2),
    "opt-125m-60": (0.6, 5e-5, 5e-3),
    "opt-125m-70": (0.7, 1e-4, 2e-3),
    "opt-125m-80": (0.8, 2e-4, 1e-3),
    "llama-2-7b-50": (0.5, 2e-4, 1e-2),
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def built(config: Path, *overrides: str) -> ElsaCLI:
    """Build everything a command line would, and stop before it runs."""
    if "FSDPStrategy" in config.read_text():  # which asks for GPUs when it is made
        overrides = ('--trainer.strategy={"class_path": "tests.distributed.worker.FSDP1"}', *overrides)
    arguments = ["--config", str(config), "--trainer.accelerator=cpu", *overrides]
    return ElsaCLI(CausalLM, CalibrationData, seed_everything_default=0, args=arguments, run=False)


def elsa(cli: LightningCLI) -> ElsaCallback:
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, ElsaCallback))
    return callback


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_builds_with_an_integer_seed_and_a_known_length(config: Path) -> None:
    cli = built(config)
    assert type(yaml.safe_load(config.read_text())["seed_everything"]) is int
    assert cli.trainer.max_steps > 0
    assert any(isinstance(c, ModelCheckpoint) and c.save_last for c in cli.trainer.callbacks)


@pytest.mark.parametrize("config", [c for c in CONFIGS if re.search("^  sparsity:", c.read_text(), re.M)], ids=name)
def test_sparsity_can_be_overridden_on_the_command_line(config: Path) -> None:
    assert elsa(built(config, "--elsa.sparsity=0.35")).constraint == Unstructured(0.35)


@pytest.mark.parametrize(
    "config", [ROOT / f"configs/{n}.yaml" for n in ("elsa", "elsa_l", "shrink", "pretrain")], ids=name
)
def test_offline_configs_name_nothing_on_a_hub(config: Path) -> None:
    cli = built(config)
    assert Path(cli.model.path, "tokenizer.json").is_file()
    assert cli.datamodule.tokenizer == cli.model.path
    assert {cli.datamodule.source.name, cli.datamodule.eval_source.name} == {"pydocs"}


def test_main_job_prunes_to_ninety_percent_with_default_settings() -> None:
    callback, default = elsa(built(ROOT / "configs/elsa.yaml")), ElsaCallback(sparsity=0.9)
    assert callback.constraint == Unstructured(0.9)
    assert (callback.schedule, callback.prox) == (default.schedule, default.prox)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([], "auto"),
        (["--model.optimizer.fused=true"], "auto"),  # no rate was given
        (["--model.optimizer.lr=2e-4"], None),
        (["--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=2e-4"], None),
        (["--model.optimizer=torch.optim.AdamW"], None),
        (["--elsa.learning_rate=auto", "--model.optimizer.lr=2e-4"], "auto"),
    ],
)
def test_a_rate_is_chosen_where_none_is_given(options: list[str], chosen: str | None) -> None:
    assert elsa(built(ROOT / "configs/elsa.yaml", *options)).learning_rate == chosen


@pytest.mark.parametrize("config", [*PAPER, ROOT / "configs/opt-125m.yaml"], ids=name)
def test_the_rate_that_a_config_gives_is_kept(config: Path) -> None:
    assert elsa(built(config)).learning_rate is None


@pytest.mark.parametrize("config", PAPER, ids=name)
def test_paper_config_holds_the_published_hyperparameters(config: Path) -> None:
    cli = built(config)
    sparsity, lr, penalty = PUBLISHED[config.stem]
    schedule = elsa(cli).schedule
    assert elsa(cli).constraint == Unstructured(sparsity, scope="tensor")
    assert elsa(cli).prox == "published"
    assert (schedule.penalty, schedule.shape, schedule.interval) == (penalty, "constant", 32)
    assert (schedule.ramp, schedule.frozen) == (0, 0)
    optimizer = cli.model.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.Adam
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (lr, 0)
    assert (optimizer.defaults["betas"], cli.trainer.gradient_clip_val) == ((0.9, 0.95), 1.0)
    data = cli.datamodule
    assert (cli.trainer.max_steps, data.batch_size, data.seq_len, data.source.name) == (4096, 8, 2048, "c4")
    assert data.train_sequences == cli.trainer.max_steps * data.batch_size  # every sequence is seen once


def test_every_published_setting_is_shipped_and_marked_as_not_run() -> None:
    assert {config.stem for config in PAPER} == PUBLISHED.keys()
    assert all("Not run here" in config.read_text().partition("seed_everything")[0] for config in PAPER)


@pytest.mark.parametrize("config", [ROOT / "configs/elsa.yaml", ROOT / "configs/elsa_l.yaml"], ids=name)
def test_command_line_accepts_the_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(config), "--trainer.max_steps", "7", "--print_config"])
    assert exit_.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 7


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=name)
def test_fragment_is_added_to_somebody_elses_callbacks(fragment: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.RichModelSummary}]}")
    cli = LightningCLI(
        BoringModel, BoringDataModule, run=False,
        args=["--config", str(theirs), "--config", str(fragment), "--trainer.accelerator=cpu"],
    )  # fmt: skip
    ours = yaml.safe_load(fragment.read_text())["trainer"]["callbacks+"][0]["class_path"].rpartition(".")[2]
    assert {"RichModelSummary", ours} <= {type(callback).__name__ for callback in cli.trainer.callbacks}

"""The callback in pipelines that are not ours: Lightning's own demos, from Python, YAML and the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos import Transformer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from elsa_lightning import ElsaCallback, Unstructured
from tests.callbacks.tiny import make_trainer, zeros

FRAGMENT = Path(__file__).parents[2] / "callbacks/elsa.yaml"
TOKENS, WIDTH = 50, 16


class DemoTransformer(LightningModule):
    """Lightning's demo language model on random tokens; its own module downloads a corpus."""

    def __init__(self, manual: bool = False, lr: float = 1e-2) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.lr = lr
        self.model = Transformer(vocab_size=TOKENS, ninp=WIDTH, nhead=2, nhid=24, nlayers=1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        inputs, target = batch[:, :-1], batch[:, 1:]
        loss = nn.functional.nll_loss(self.model(inputs, target), target.reshape(-1))
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Tensor]:
        ids = torch.randint(TOKENS, (24, 9), generator=torch.Generator().manual_seed(0))
        return DataLoader(list(ids), batch_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_class", [BoringModel, ManualOptimBoringModel])
def test_boring_model(model_class: type[BoringModel], tmp_path: Path) -> None:
    model = model_class()
    make_trainer(tmp_path, ElsaCallback(sparsity=0.9), max_steps=20).fit(model)
    assert zeros(model.state_dict()) == {"layer.weight": 58}  # of 64, and 6 survive


@pytest.mark.parametrize("manual", [False, True])
def test_demo_transformer(manual: bool, tmp_path: Path) -> None:
    model = DemoTransformer(manual)
    dense = dict.fromkeys(zeros(model.state_dict()), 0)
    make_trainer(tmp_path, ElsaCallback(sparsity=0.9), max_epochs=2).fit(model)
    # its decoder has one output per embedded token, so it is an LM head
    matrices = ("linear1.weight", "linear2.weight", "out_proj.weight", "in_proj_weight")
    pruned = {name: p.numel() for name, p in model.named_parameters() if name.endswith(matrices)}
    found = zeros(model.state_dict())
    assert len(pruned) == 10 and sum(found[name] for name in pruned) == round(0.9 * sum(pruned.values()))
    assert all(found[name] > 0.5 * entries for name, entries in pruned.items())
    assert found | dict.fromkeys(pruned, 0) == dense


# ---------------------------------------------------------------------- somebody's LightningCLI


def foreign_config(folder: Path, **trainer: Any) -> str:
    """Write the configuration of a pipeline that knows nothing of us, with a callback of its own."""
    file = folder / "theirs.yaml"
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": 12,
        "enable_model_summary": False, "default_root_dir": str(folder), "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(folder), "filename": "{step}", "auto_insert_metric_name": False,
                          "every_n_train_steps": 4, "save_top_k": -1}}],
    }  # fmt: skip
    file.write_text(yaml.safe_dump({"seed_everything": 1, "trainer": quiet | trainer}))
    return str(file)


def run_cli(model: type[LightningModule], *arguments: str, data: Any = None) -> LightningCLI:
    return LightningCLI(model, data, save_config_callback=None, args=["fit", *arguments], seed_everything_default=1)


def elsas(cli: LightningCLI) -> list[ElsaCallback]:
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ElsaCallback)]


def test_the_fragment_adds_the_callback_to_their_config(tmp_path: Path) -> None:
    theirs = foreign_config(tmp_path)
    cli = run_cli(BoringModel, "--config", theirs, "--config", str(FRAGMENT), data=BoringDataModule)
    (elsa,) = elsas(cli)
    assert elsa.constraint == Unstructured(0.9)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3  # their callback is still there
    saved = torch.load(tmp_path / "12.ckpt", weights_only=True)
    assert zeros(saved["state_dict"]) == zeros(cli.model.state_dict()) == {"layer.weight": 58}


def test_the_fragment_prunes_the_demo_transformer_and_its_run_resumes(tmp_path: Path) -> None:
    theirs = foreign_config(tmp_path, max_epochs=2, max_steps=-1)
    arguments = ("--config", theirs, "--config", str(FRAGMENT), "--model.lr", "3e-3")
    whole = run_cli(DemoTransformer, *arguments)
    resumed = run_cli(DemoTransformer, *arguments, "--ckpt_path", str(tmp_path / "12.ckpt"))
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, resumed.model.state_dict()[name]), name
    assert zeros(resumed.model.state_dict())["model.transformer.encoder.layers.0.linear1.weight"] > 192  # of 384


def test_an_argument_of_the_fragment_can_be_changed(tmp_path: Path) -> None:
    theirs = foreign_config(tmp_path)
    cli = run_cli(BoringModel, "--config", theirs, "--config", str(FRAGMENT), "--trainer.callbacks.sparsity=0.7")
    assert zeros(cli.model.state_dict()) == {"layer.weight": 45}


def test_the_callback_can_be_added_without_a_file(tmp_path: Path) -> None:
    theirs = foreign_config(tmp_path)
    added = ("--trainer.callbacks+=elsa_lightning.ElsaCallback", "--trainer.callbacks.sparsity=0.7")
    cli = run_cli(BoringModel, "--config", theirs, *added)
    assert len(elsas(cli)) == 1
    assert zeros(cli.model.state_dict()) == {"layer.weight": 45}


EVERYTHING = """
trainer:
  callbacks+:
    - class_path: elsa_lightning.ElsaCallback
      init_args:
        constraint: {class_path: elsa_lightning.Unstructured, init_args: {sparsity: 0.5}}
        penalty: 0.01
        penalty_schedule: linear
        prox: coupled
        interval: 2
        ramp: 0.25
        frozen: 0.25
        targets: [all-linear, 'layer\\.weight']
        ignore: [bias]
        optimizer_index: 0
"""


def test_every_argument_can_be_said_in_yaml(tmp_path: Path) -> None:
    theirs, ours = foreign_config(tmp_path), tmp_path / "ours.yaml"
    ours.write_text(EVERYTHING)
    cli = run_cli(BoringModel, "--config", theirs, "--config", str(ours))
    (elsa,) = elsas(cli)
    assert (elsa.constraint, elsa.prox, elsa.schedule.interval) == (Unstructured(0.5), "coupled", 2)
    assert zeros(cli.model.state_dict()) == {"layer.weight": 32}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.callbacks.sparsity=90", "got 90.0; for 90 % give 0.9"),
        ("--trainer.callbacks.penalty_schedule=sudden", "penalty_schedule"),
        ("--trainer.callbacks.intervall=3", "intervall"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_before_training(
    argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = foreign_config(tmp_path)
    with pytest.raises((SystemExit, ValueError)) as stopped:
        run_cli(BoringModel, "--config", theirs, "--config", str(FRAGMENT), argument)
    assert message in capsys.readouterr().err + str(stopped.value)
    assert list(tmp_path.glob("*.ckpt")) == []


def test_a_fragment_given_twice_is_refused(tmp_path: Path) -> None:
    theirs = foreign_config(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match="ElsaCallback"):
        run_cli(BoringModel, "--config", theirs, "--config", str(FRAGMENT), "--config", str(FRAGMENT))


def test_pruning_leaves_the_pipeline_as_it_was_when_it_does_nothing(tmp_path: Path) -> None:
    """Without sparsity and penalty the run is bit-identical to one without the callback, dropout and data included."""
    results = []
    for callbacks in ([], [ElsaCallback(sparsity=0.0)]):
        seed_everything(0, verbose=False)
        model = DemoTransformer()
        make_trainer(tmp_path, *callbacks, max_epochs=2, gradient_clip_val=0.1, accumulate_grad_batches=2).fit(model)
        results.append(model.state_dict())
    assert all(torch.equal(p, results[1][name]) for name, p in results[0].items())

"""KeepMask: a sparse model is fine-tuned in any pipeline and loses no zero."""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file
from torch import Tensor, nn

from elsa_lightning import NM, CalibrationData, CausalLM, ElsaCallback, KeepMask, KeptZeros, sparsity
from elsa_lightning.callbacks import SaveHuggingFace
from elsa_lightning.inspection import TensorZeros
from elsa_lightning.sparse import sparse_weights
from tests.callbacks.tiny import WIDTH, At, Net, adam8bit, assert_same, every_step, load, loader, make_trainer

FRAGMENT = Path(__file__).parents[2] / "callbacks/keep_mask.yaml"


class Rotated(torch.optim.SGD):
    """Also moves every weight by its row's mean gradient, as optimizers that work in another basis mix weights."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.mean(dim=-1, keepdim=True), alpha=group["lr"])
        return loss


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.3),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1),
    "plain-sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "adam8bit": adam8bit,
    "rotated": lambda params: Rotated(params, lr=0.05),
}


@torch.no_grad()
def prune(model: Any) -> None:
    """Make one matrix 80 % zeros anywhere, and another 2:4."""
    first, last = model.layers[0].weight, model.layers[3].weight
    first.masked_fill_(torch.rand(first.shape, generator=torch.Generator().manual_seed(2)) < 0.8, 0)
    last.view(-1, 4)[:, 1:3] = 0


class Sparse(Net):
    """A net that is pruned already, with a dense layer beside it."""

    def __init__(self, optimizer: str = "adamw", manual: bool = False, lr: float | None = None) -> None:
        super().__init__("adam", manual=manual)
        self.kind, self.lr = optimizer, lr
        self.norms: list[float] = []
        prune(self)
        self.dense = nn.Linear(WIDTH, WIDTH)

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch) + self.dense(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.kind](self.parameters())
        if self.lr is not None:  # which a finder sets
            optimizer.param_groups[0]["lr"] = self.lr
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))


def masks(model: Any) -> dict[str, Tensor]:
    return {name: model.get_parameter(name) != 0 for name in ("layers.0.weight", "layers.3.weight")}


def fit(folder: Path, *callbacks: Any, net: dict[str, Any] | None = None, resume: Path | None = None, keep: Any = None,
        **options: Any) -> Sparse:  # fmt: skip
    seed_everything(1, verbose=False)
    model = Sparse(**(net or {}))
    validation = options.pop("validation", None)
    trainer = make_trainer(folder, keep or KeepMask(), *callbacks, **({"max_steps": 8} | options))
    trainer.fit(model, loader(), validation, ckpt_path=resume)
    return model


def assert_zeros_kept(model: Any) -> None:
    before = Sparse()
    for name, mask in masks(before).items():
        p = model.get_parameter(name)
        assert not p[~mask].any(), name
        assert int((p[mask] != 0).sum()) > 0.98 * int(mask.sum()), "what is not 0 trains"
    assert_dense_trained(model)


def assert_dense_trained(model: Any) -> None:
    assert bool((model.dense.weight != 0).all())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_loses_a_zero(optimizer: str, tmp_path: Path) -> None:
    keep = KeepMask()
    model = fit(tmp_path, keep=keep, net={"optimizer": optimizer}, gradient_clip_val=0.5, accumulate_grad_batches=2)
    assert_zeros_kept(model)
    for name, mask in masks(Sparse()).items():
        state = keep.keep.optimizer.state[model.get_parameter(name)]
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg"):
            if key in state:
                assert not state[key][~mask].any() and state[key][mask].any(), key


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"plugins": [MixedPrecision("16-mixed", "cpu")], "gradient_clip_val": 0.1},
        {"net": {"manual": True}},
        {"max_steps": -1, "max_epochs": 2},
        {"max_steps": -1, "max_epochs": -1, "max_time": {"seconds": 2}},
    ],
    ids=["bf16-mixed", "bf16-true", "grad-scaler", "manual", "epochs", "no-length"],
)
def test_no_pipeline_loses_a_zero(options: dict[str, Any], tmp_path: Path) -> None:
    assert_zeros_kept(fit(tmp_path, **options))


class Masked(nn.Module):
    """The reference, w = mask · θ: only kept weights are trained."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", mask)

    def forward(self, theta: Tensor) -> Tensor:
        return theta * self.kept  # type: ignore[no-any-return]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_is_training_of_the_kept_weights_alone_clipping_and_all(optimizer: str, tmp_path: Path) -> None:
    options = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    model = fit(tmp_path / "kept", net={"optimizer": optimizer}, **options)
    seed_everything(1, verbose=False)
    reference = Sparse(optimizer)
    for name, mask in masks(reference).items():
        nn.utils.parametrize.register_parametrization(reference.get_submodule(name[:-7]), "weight", Masked(mask))
    make_trainer(tmp_path / "reference", max_steps=8, **options).fit(reference, loader())
    assert torch.allclose(torch.tensor(model.norms), torch.tensor(reference.norms), rtol=1e-5)
    for place in (0, 3):
        assert torch.allclose(model.layers[place].weight, reference.layers[place].weight, rtol=1e-4, atol=1e-6)
    assert torch.allclose(model.dense.weight, reference.dense.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net", [{"optimizer": name} for name in ("adamw", "adam8bit", "plain-sgd")], ids=str)
@pytest.mark.parametrize("at", [1, 5])
def test_a_resumed_run_is_the_run_to_the_bit(net: dict[str, Any], at: int, tmp_path: Path) -> None:
    fit(tmp_path / "whole", every_step(tmp_path / "whole"), net=net)
    fit(tmp_path / "again", every_step(tmp_path / "again"), net=net, resume=tmp_path / f"whole/{at}.ckpt")
    one, other = (load(tmp_path / name / "8.ckpt") for name in ("whole", "again"))
    for key in ("state_dict", "optimizer_states"):
        assert_same(one[key], other[key], key)
    assert_same(one["callbacks"]["KeepMask"], other["callbacks"]["KeepMask"])


def test_it_says_what_it_keeps_which_pattern_and_what_it_leaves_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep = KeepMask()
    with caplog.at_level(logging.INFO):
        fit(tmp_path, keep=keep)
    kept, left = keep.keep.kept.kept, keep.keep.kept.left_alone
    assert [(t.name, t.zeros, t.pattern) for t in kept] == [
        ("layers.0.weight", int((~masks(Sparse())["layers.0.weight"]).sum()), None),
        ("layers.3.weight", WIDTH * WIDTH // 2, "2:4"),
    ]
    assert [(t.name, t.zeros) for t in left] == [("dense.weight", 0)]
    assert "2 of 3 tensors keep" in caplog.text and "2:4 in 1 of them" in caplog.text
    assert f"1 left alone, with too few zeros: dense.weight (0 zeros of {WIDTH * WIDTH:,})" in caplog.text
    assert "zeros kept was lost in 8 optimizer steps" in caplog.text


def test_a_dense_model_is_refused_before_training(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    with pytest.raises(ValueError, match=r"no tensor has min_sparsity=0.05 zeros; the most are in layers.0.weight, 0 "):
        make_trainer(tmp_path, KeepMask(), max_steps=1).fit(Net(), loader())
    with pytest.raises(ValueError, match=r"min_sparsity must be a fraction of zeros from 0 to 1, .* got 2"):
        KeepMask(min_sparsity=2)


def test_zeros_of_embeddings_stay_too_and_norms_are_not_asked(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 50))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0  # type: ignore[index]
        model[2].weight[:40] = 0  # type: ignore[index]
    assert set(sparse_weights(model).parameters) == {"0.weight", "2.weight"}
    assert set(sparse_weights(model, ["all-linear"]).parameters) == {"2.weight"}
    assert set(sparse_weights(model, ignore=["^2"]).parameters) == {"0.weight"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_frozen_weights_that_no_optimizer_can_train_are_not_looked_for(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))
    half = torch.arange(16) % 2 * torch.ones(50, 1)
    model[0].weight = nn.Parameter(half.to(dtype), requires_grad=False)
    model[1].weight = nn.Parameter(half.clone())
    chosen = sparse_weights(model)
    assert chosen.parameters.keys() == {"1.weight"} and chosen.targets == ("all-linear",)


def test_what_moves_zeros_behind_the_step_is_undone_and_said(tmp_path: Path) -> None:
    def move(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.lightning_module.layers[0].weight.add_(0.1)  # type: ignore[index,union-attr,operator]

    with pytest.warns(UserWarning, match="weights that the mask does not keep were moved"):
        assert_zeros_kept(fit(tmp_path, At(6, move), validation=loader(1)))


def test_a_lost_zero_is_an_error_at_the_end(tmp_path: Path) -> None:
    keep = KeepMask()

    def lose(trainer: Trainer) -> None:
        tensor = keep.keep.tensors["layers.0.weight"]
        tensor.set_mask(slice(0, 1), torch.ones(1, WIDTH, dtype=torch.bool))
        with torch.no_grad():
            tensor.p[0] = 1.0

    with pytest.raises(ValueError, match=r"zeros were lost .*layers.0.weight: \d+ of"):
        fit(tmp_path, At(8, lose), keep=keep)


class Transfer(Sparse):
    """Trains a head on a sparse backbone that is frozen, as transfer learning does; ``head`` is no weight to keep."""

    def __init__(self, everything: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.everything = self.layers, nn.Linear(WIDTH, WIDTH), everything
        del self.dense

    def loss(self, batch: Tensor) -> Tensor:
        return self.head(self.layers(batch)).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if self.everything or p.requires_grad]
        return torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.3)


class Late(Transfer):
    """Unfreezes its backbone in the middle of a step."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        if self.global_step == 4:
            self.backbone.requires_grad_(True)
        return super().training_step(batch, index)


def transfer(folder: Path, model: Any, *callbacks: Any, resume: Path | None = None) -> Any:
    seed_everything(1, verbose=False)
    model = model()
    model.backbone.requires_grad_(False)
    trainer = make_trainer(folder, *callbacks, KeepMask(), max_epochs=3, gradient_clip_val=0.05)
    trainer.fit(model, loader(4), ckpt_path=resume)
    return model


@pytest.mark.parametrize("way", ["BackboneFinetuning", "all given to the optimizer", "within a step"])
def test_zeros_of_layers_that_are_unfrozen_later_are_kept(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unfreeze = At(4, lambda trainer: trainer.lightning_module.backbone.requires_grad_(True))  # type: ignore[union-attr,operator]
    with caplog.at_level(logging.INFO):
        if way == "BackboneFinetuning":
            model = transfer(tmp_path, Transfer, BackboneFinetuning(1))
        elif way == "within a step":
            model = transfer(tmp_path, lambda: Late(everything=True))
        else:
            model = transfer(tmp_path, lambda: Transfer(everything=True), unfreeze)
    before = Sparse()
    for name, mask in masks(before).items():
        p = model.get_parameter(name)
        assert not p[~mask].any(), name
        assert bool((p[mask] != before.get_parameter(name)[mask]).any()), "what is kept is trained"
        first = {"exp_avg", "exp_avg_sq"} & model.optimizers().state[p].keys()
        assert first and not any(model.optimizers().state[p][key][~mask].any() for key in first)
    assert "2 tensors are frozen (requires_grad False): layers.0.weight" in caplog.text
    assert "KeepMask: unfrozen, 2 of 2 tensors keep" in caplog.text
    assert "zeros kept was lost in 12 optimizer steps" in caplog.text


@pytest.mark.parametrize("at", [2, 7])
def test_a_run_in_which_layers_are_unfrozen_resumes_with_their_masks(at: int, tmp_path: Path) -> None:
    """Lightning's callback does not unfreeze in a resumed run what was unfrozen before, so one of our own does."""

    class Unfreeze(BackboneFinetuning):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch >= 1:
                self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=1e-3)

    def run(folder: str, resume: Path | None = None) -> Any:
        return transfer(tmp_path / folder, Transfer, Unfreeze(), every_step(tmp_path / folder), resume=resume)

    run("whole")
    run("again", tmp_path / f"whole/{at}.ckpt")
    one, other = (load(tmp_path / name / "12.ckpt") for name in ("whole", "again"))
    assert len(one["callbacks"]["KeepMask"]["admm"]["kept"]) == 2
    assert_same(one["callbacks"]["KeepMask"]["admm"]["kept"], other["callbacks"]["KeepMask"]["admm"]["kept"])
    for name, mask in masks(Sparse()).items():
        assert not other["state_dict"][name][~mask].any()
        assert other["state_dict"][name][mask].any()


def test_what_something_else_trains_later_is_named_with_its_lost_zeros(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fill(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.lightning_module.layers[0].weight.add_(0.1)  # type: ignore[index,union-attr,operator]

    class Half(Sparse):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)

    def run(*callbacks: Any) -> None:
        seed_everything(1, verbose=False)
        model = Half()
        model.layers[0].requires_grad_(False)
        make_trainer(tmp_path, KeepMask(), *callbacks, max_steps=8).fit(model, loader())

    zeros = int((~masks(Sparse())["layers.0.weight"]).sum())
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*KeepMask")
        run()
    assert f"1 tensors are frozen (requires_grad False): layers.0.weight ({zeros:,} zeros of {WIDTH * WIDTH:,})" in (
        caplog.text
    )
    with pytest.warns(UserWarning, match=rf"zeros of 1 tensors were lost .*layers.0.weight: [\d,]+ of {zeros:,}\)"):
        run(At(4, fill))


def test_a_plain_loop_may_unfreeze_layers_and_another_run_may_take_some_over() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with torch.no_grad():
        for p in model.parameters():
            p[::2] = 0
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    keep = KeptZeros(optimizer, sparse_weights(model).parameters)
    assert set(keep.later) == {"0.weight"}

    def step() -> None:
        optimizer.zero_grad()
        (model(torch.randn(8, 16)) - 1).square().mean().backward()
        optimizer.step()

    for number in range(6):
        if number == 3:
            optimizer.add_param_group({"params": list(model[0].requires_grad_(True).parameters())})
        step()
    keep.finish()
    assert [t.name for t in keep.kept.kept] == ["2.weight", "0.weight"] and not keep.later
    assert not model[0].weight[::2].any() and bool(model[0].weight[1::2].all())
    again = KeptZeros(optimizer, {"2.weight": model[2].weight})
    step()
    again.finish()
    assert not model[0].weight[::2].any() and not model[2].weight[::2].any()


def test_averaged_weights_keep_the_zeros(tmp_path: Path) -> None:
    assert_zeros_kept(fit(tmp_path, WeightAveraging()))


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path))
    with pytest.raises(ValueError, match="other settings"):
        fit(tmp_path, keep=KeepMask(targets=["layers.*weight"]), resume=tmp_path / "5.ckpt")


def test_a_plain_loop_resumes_with_the_masks_not_with_the_zeros_of_the_moment() -> None:
    def make() -> tuple[nn.Sequential, torch.optim.Optimizer, KeptZeros]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        with torch.no_grad():
            model[0].weight[:, ::2] = 0  # type: ignore[index]
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return model, optimizer, KeptZeros(optimizer, sparse_weights(model).parameters)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 16)).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    model, optimizer, keep = make()
    step(model, optimizer)
    with torch.no_grad():
        model[0].weight[0, 1] = 0  # type: ignore[index]
    saved = [part.state_dict() for part in (model, optimizer, keep)]
    saved = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, saved)
    again = make()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    for model_, optimizer_, keep_ in ((model, optimizer, keep), again):
        step(model_, optimizer_)
        keep_.finish()
    assert float(model[0].weight[0, 1].detach()) != 0  # type: ignore[index]
    assert_same(dict(model.state_dict()), dict(again[0].state_dict()))
    assert not model[0].weight[:, ::2].any()  # type: ignore[index]


def test_what_had_no_gradient_when_it_was_saved_is_kept_or_left_alone_as_before() -> None:
    """One of two sparse tensors trains later, a kept weight is 0 when it is saved, and gradients of zeros are NaN."""
    start = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    start[:2, ::2], start[2, 0, 0] = 0, 0

    def make(weights: Tensor) -> tuple[nn.ParameterDict, torch.optim.Optimizer, KeptZeros]:
        model = nn.ParameterDict({name: nn.Parameter(t.clone()) for name, t in zip("abc", weights, strict=True)})
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return model, optimizer, KeptZeros(optimizer, dict(model.named_parameters()), min_sparsity=0.1)

    def step(model: nn.ParameterDict, optimizer: torch.optim.Optimizer, names: str) -> None:
        optimizer.zero_grad()
        for name in names:
            model[name].grad = torch.ones(8, 8)
            if name != "c":
                model[name].grad[::2] = torch.nan
        optimizer.step()

    model, optimizer, keep = make(start)
    step(model, optimizer, "a")
    with torch.no_grad():
        model["a"][1, 1] = 0
    again = make(torch.stack([p.detach() for p in model.values()]))
    with pytest.raises(ValueError, match="the optimizer's state has no masks"):
        make(start)[2].load_state_dict(keep.state_dict())
    again[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again[2].load_state_dict(keep.state_dict())
    for model_, optimizer_, keep_ in ((model, optimizer, keep), again):
        for _ in range(3):
            step(model_, optimizer_, "abc")
        keep_.finish()
        zeros = torch.cat([start[:2] == 0, torch.zeros(1, 8, 8, dtype=torch.bool)])
        assert torch.equal(torch.stack([p.detach() == 0 for p in model_.values()]), zeros)
    assert_same(dict(model.state_dict()), dict(again[0].state_dict()))


class Averaged(Rotated):
    """Keeps a mean of the weights, as optimizers do that swap it in for evaluation."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("mean", p.clone()).lerp_(p, 0.1)
        return loss


def test_means_of_the_weights_in_an_optimizer_keep_the_zeros_and_a_pause_keeps_none() -> None:
    """Nor does one that was detached."""
    p = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        p[:, ::2] = 0
    optimizer = Averaged([p], lr=0.01)
    keep = KeptZeros(optimizer, {"p": p})

    def step() -> None:
        optimizer.zero_grad()
        (p - 1).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step()
    mean = optimizer.state[p]["mean"]
    assert not mean[:, ::2].any() and bool(mean[:, 1::2].all())
    for detached in (False, True):
        if detached:
            keep.detach()
        keep.paused = not detached
        step()
        assert bool(p[:, ::2].all()) and p.grad is not None and bool(p.grad[:, ::2].all())


def test_moments_of_an_earlier_run_forget_what_is_zero() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.weight[:, ::2] = 0
    KeptZeros(optimizer, sparse_weights(model).parameters)
    moments = optimizer.state[model.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert not moments[key][:, ::2].any() and moments[key][:, 1::2].all()


def test_the_fragment_adds_it_to_anybodys_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    LightningCLI(
        Sparse, run=True, save_config_callback=None,
        args=["fit", f"--config={FRAGMENT}", "--trainer.max_steps=4", "--trainer.accelerator=cpu",
              "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--model.optimizer=sgd",
              "--data=tests.callbacks.test_keep_mask.Data", "--trainer.callbacks.min_sparsity=0.4"],
    )  # fmt: skip
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = load(checkpoint)["state_dict"]
    for name, mask in masks(Sparse()).items():
        assert not state[name][~mask].any() and state[name][mask].any()


class Data(LightningDataModule):
    """The batches."""

    def train_dataloader(self) -> Any:
        return loader()


def test_pruned_saved_measured_fine_tuned_and_saved_again(
    tiny_llama: str, text_file: Path, token_cache: str, tmp_path: Path
) -> None:
    def run(model: str, name: str, callback: Any) -> dict[str, TensorZeros]:
        seed_everything(1, verbose=False)
        data = CalibrationData(str(text_file), tokenizer=model, seq_len=32, batch_size=4, eval_segments=4,
                               cache_dir=token_cache)  # fmt: skip
        trainer = make_trainer(tmp_path, callback, SaveHuggingFace(str(tmp_path / name)), max_steps=6)
        trainer.fit(CausalLM(model), data)
        return {t.name: t for t in sparsity(tmp_path / name).tensors}

    pruned = run(tiny_llama, "pruned", ElsaCallback(constraint=NM(2, 4)))
    tuned = run(str(tmp_path / "pruned"), "tuned", KeepMask())
    assert pruned.keys() == tuned.keys()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "tuned"))
    for name, t in pruned.items():
        assert not after[name][before[name] == 0].any() and not torch.equal(before[name], after[name]), name
        assert tuned[name].pattern == t.pattern == ("2:4" if "proj" in name else None)


def test_a_learning_rate_finder_leaves_the_zeros_alone(tmp_path: Path) -> None:
    assert_zeros_kept(fit(tmp_path, LearningRateFinder(num_training_steps=5), net={"lr": 1e-3}))

"""The command line on a tiny model, and what importing costs."""

import ast
import inspect
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import elsa_lightning
import elsa_lightning.callbacks
import elsa_lightning.evaluation
import elsa_lightning.export
import elsa_lightning.sets
from elsa_lightning import NM, ByPattern, ElsaCallback, Quantized, Unstructured, cli
from elsa_lightning.callbacks.progress import LineProgress
from elsa_lightning.cli import main
from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.selection import select
from elsa_lightning.training import ElsaCLI, check_checkpoint


def test_fit_prunes_and_writes_a_model_that_every_command_takes(
    tiny_llama: str,
    token_cache: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    common = [
        f"--model.name={tiny_llama}",
        "--data.seq_len=32",
        "--data.eval_segments=8",
        f"--data.cache_dir={token_cache}",
    ]
    quiet = [
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    main(["fit", "--config", "configs/elsa.yaml", "--trainer.max_steps=12", "--elsa.sparsity=0.75",
          *common, *quiet])  # fmt: skip
    (folder,) = tmp_path.rglob("hf")
    printed = capsys.readouterr().out
    following = re.findall(r"^  (?:elsa|python -m elsa_lightning) (test .*)$", printed, re.M)
    assert re.search(r"^(Not c|C)onverged: .*\nSaved: .*hf, 0\.\d MB", printed, re.M)
    (told,) = [m for m in map(str.strip, caplog.messages) if m.startswith("Prunes")]
    run = re.escape(str(folder.parent))
    for line, expected in zip(
        told.splitlines(),
        [
            r"Prunes    .*tiny-llama to 75 % zeros in 17,408 of its 83,104 weights",
            r"Takes     12 steps of 8 × 32 tokens, 3,072 in all; the mask is fixed after step 8",
            r"Memory    about 0\.\d+ GiB on each device .*",
            rf"Writes    {run}: the sparse model \(hf\), checkpoints; curves: tensorboard --logdir .*",
            rf"Stopping  Ctrl-C saves a checkpoint; to go on: .* fit --config {run}/config.yaml --ckpt_path CHECKPOINT",
        ],
        strict=True,
    ):
        assert re.fullmatch(expected, line), line
    model = AutoModelForCausalLM.from_pretrained(folder)
    pruned = select(model).parameters.values()
    assert sum(int((p == 0).sum()) for p in pruned) == round(0.75 * sum(p.numel() for p in pruned))
    assert int((model.get_input_embeddings().weight == 0).sum()) == 0
    capsys.readouterr()
    (test,) = following  # what the run says to do next
    main([*test.split(), *quiet])
    assert "test/perplexity" in capsys.readouterr().out
    for command in ("validate", "test"):
        main([command, f"--model.name={folder}", *common[1:], "--trainer.logger=false", *quiet])
        printed = capsys.readouterr().out
        assert "perplexity" in printed
    main(["predict", f"--model.name={folder}", *common[1:], "--trainer.logger=false", *quiet])
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    losses = [json.loads(line)["nats_a_token"] for line in lines]
    measured = float(re.findall(r"test/perplexity\W+([\d.]+)", printed)[0])
    assert len(losses) == 8 and math.exp(sum(losses) / 8) == pytest.approx(measured, rel=1e-4)
    assert f"8 sequences, mean {sum(losses) / 8:.4f} nats a token" in capsys.readouterr().out
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 12
    others = ["--data.seq_len=16", "--data.batch_size=2", f"--model.name={tiny_llama}", *common[2:]]
    main(["test", "--config=configs/elsa.yaml", f"--ckpt_path={checkpoint}", *others, *quiet])
    assert "test/perplexity" in capsys.readouterr().out


def test_shipped_configurations_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config=configs/elsa.yaml", "--print_config"])
    assert end.value.code == 0 and "sparsity: 0.9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            "--elsa.sparsity=90",
            "sparsity must be a fraction of zeros in [0, 1), got 90.0; for 90 %",
        ),
        ("--ckpt_path=./no.ckpt", "ckpt_path './no.ckpt' does not exist; give a .ckpt of an earlier run"),
        (
            "--ckpt_path=elsa_lightning/models/pydocs-2m",
            "ckpt_path 'elsa_lightning/models/pydocs-2m' is a folder, and no",
        ),
        ("--ckpt_path=configs/elsa.yaml", "ckpt_path 'configs/elsa.yaml' is no checkpoint: give a .ckpt"),
        ("--data.name=./nowhere", "data.name './nowhere' is not 'pydocs'"),
        ("--data.eval_name=./nowhere", "data.eval_name './nowhere' is not 'pydocs'"),
        ("--data.tokenizer=./tokenizer", "data.tokenizer is the model's own here"),
        ("--model.name=./nowhere", "model name './nowhere' is a path that does not exist"),
        ("--data.seq_len=4096", "the data has sequences of 4096 tokens, and 'pydocs-2m' takes at most 512"),
        ("--elsa.ignore=[mpl]", "ignore: 'mpl' matches no parameter"),
        ("--trainer.accelerator=gpu", "No supported gpu backend found"),
    ],
)
def test_a_mistake_ends_with_one_line_before_any_text_is_read(
    mistake: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config=configs/elsa.yaml", f"--trainer.default_root_dir={tmp_path}",
              f"--data.cache_dir={tmp_path / 'cache'}", mistake])  # fmt: skip
    assert end.value.code == 1
    assert f"elsa: error: {message}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "cache").exists()


def small_run(model: str, cache: str, folder: Path) -> list[str]:
    return ["fit", "--config=configs/elsa.yaml", f"--model.name={model}", "--model.distillation=0",
            "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--data.seq_len=32", "--data.eval_segments=8",
            f"--data.cache_dir={cache}", f"--trainer.default_root_dir={folder}"]  # fmt: skip


def test_the_command_line_decides_about_a_resumed_model_and_the_difference_is_told(
    tiny_llama: str, token_cache: str, tmp_path: Path
) -> None:
    """Here the model moved to another folder; patterns with the module's whole names work on the way."""
    run = [*small_run(tiny_llama, token_cache, tmp_path), r"--elsa.targets=[^model\.model\.layers.*proj]"]
    main(run)
    moved = shutil.copytree(tiny_llama, tmp_path / "moved")
    again = [f"--model.name={moved}", "--trainer.max_steps=3", f"--ckpt_path={next(tmp_path.rglob('last.ckpt'))}"]
    with pytest.warns(UserWarning, match=r"other settings of the model .*name: .*moved here"):
        main([*run, *again])


def test_a_resumed_run_that_measures_on_other_text_does_not_compare_with_the_former_dense_model(
    tiny_llama: str, token_cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    run = small_run(tiny_llama, token_cache, tmp_path)
    main(run)
    again = ["--trainer.max_steps=3", f"--ckpt_path={next(tmp_path.rglob('last.ckpt'))}"]
    caplog.clear()
    main([*run, *again])
    assert "dense → " in caplog.text
    caplog.clear()
    with pytest.warns(UserWarning, match=r"perplexity on other text .*eval_segments changed"):
        main([*run, *again, "--data.eval_segments=6"])
    assert "dense → " not in caplog.text


@pytest.mark.parametrize("options", [[], ["--model.lr_schedule=constant"]])
def test_a_run_that_ends_by_the_clock_needs_a_constant_rate(
    options: list[str], tiny_llama: str, token_cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*small_run(tiny_llama, token_cache, tmp_path)[:-1], "--elsa.sparsity=null", "--trainer.max_steps=-1",
           "--trainer.max_time=00:00:00:03", "--trainer.callbacks=null", f"--trainer.default_root_dir={tmp_path}",
           "--trainer.limit_val_batches=0", "--trainer.val_check_interval=null", *options]  # fmt: skip
    if options:
        main(run)
        return
    with pytest.raises(SystemExit):
        main(run)
    assert "lr_schedule 'linear' needs to know how long the run is" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(tiny_llama, name), alone)
    with pytest.raises(SystemExit):
        main(small_run(str(alone), str(tmp_path / "cache"), tmp_path))
    assert "alone' has no tokenizer" in capsys.readouterr().err
    main(["plan", "--config=configs/elsa.yaml", f"--model.name={alone}", "--data.seq_len=32"])  # which needs none
    assert "constrained" in capsys.readouterr().out


def test_a_checkpoint_of_weights_alone_or_of_a_sharded_run_is_refused(
    tiny_llama: str, token_cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tiny_llama, token_cache, tmp_path)
    main(run)
    whole = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    weights = tmp_path / "weights.ckpt"
    torch.save(
        {key: whole[key] for key in ("state_dict", "pytorch-lightning_version", "epoch", "global_step")}, weights
    )
    with pytest.raises(SystemExit):
        main([*run, f"--ckpt_path={weights}"])
    assert "ckpt_path holds weights only" in capsys.readouterr().err
    sharded = tmp_path / "sharded.ckpt"
    sharded.mkdir()
    (sharded / ".metadata").touch()
    for command in ("fit", "test"):
        with pytest.raises(SystemExit):
            main([command, *run[1:], f"--ckpt_path={sharded}"])
        assert "is a distributed checkpoint, which SingleDeviceStrategy does not load: " in capsys.readouterr().err


SET = "--elsa.constraint={{class_path: elsa_lightning."


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--trainer.max_stps=3", "unrecognized argument: --trainer.max_stps; did you mean --trainer.max_steps?"),
        ("--trainer.max_step=3", "unrecognized argument: --trainer.max_step; did you mean --trainer.max_steps?"),
        ("--elsa.sparsty=0.7", "unrecognized argument: --elsa.sparsty; did you mean --elsa.sparsity?"),
        ("--sparsity=0.7", "unrecognized argument: --sparsity; did you mean --elsa.sparsity?"),
        ("--model_name=x", "unrecognized argument: --model_name; did you mean --model.name?"),
        ("--data.seqlen=7", "unrecognized argument: data.seqlen; did you mean --data.seq_len?"),
        ("--trainer.callbacks.sparsity=0.7", "trainer.callbacks.sparsity; did you mean --elsa.sparsity?"),
        ("--model.optimizer.lrr=1", "unrecognized argument: model.optimizer.lrr"),
        ("--data.seq_len=long", "data.seq_len: Expected a <class 'int'>. Got value: long"),
        ("--trainer.max_steps=long", "trainer.max_steps: Expected a <class 'int'>. Got value: long"),
        (SET + "NM, init_args: {{n: 2}}}}", "elsa_lightning.NM: the following arguments are required: m (see"),
        (SET + "NMM, init_args: {{n: 2}}}}", "elsa_lightning.NMM: module 'elsa_lightning' has no attribute 'NMM' (see"),
        (
            SET + "ByPattern, init_args: {{sets: {{a: NMM}}}}}}",
            'elsa_lightning.ByPattern: Parser key "sets": Expected a',
        ),
        (SET + "Neurons, init_args: {{fraction: half}}}}", "fraction: Expected a <class 'float'>. Got value: half"),
        ("--elsa.constraint=0.9", "elsa.constraint: Expected a class_path and its init_args. Got value: 0.9"),
        ("--config=nowhere.yaml", "File does not exist: "),
        ("--config={}/wrong.yaml", "unrecognized argument: trainer.max_stps; did you mean --trainer.max_steps?"),
        ("more", "unrecognized argument: more"),
    ],
)
def test_what_cannot_be_parsed_is_told_in_one_line(
    given: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text("trainer: {max_stps: 3}")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config=configs/elsa.yaml", given.format(tmp_path)])
    printed = capsys.readouterr().err
    last = printed.splitlines()[-1]
    assert end.value.code == 2 and "usage" not in printed
    assert last.startswith("elsa: error: ") and told in last


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--trainer.strategy=nonsense", "You selected an invalid strategy name: `strategy='nonsense'`"),
        ("--trainer.accelerator=gpus", "You selected an invalid accelerator name: `accelerator='gpus'`"),
        pytest.param(
            "--trainer.logger=CometLogger",
            "Requirement 'comet-ml",
            marks=pytest.mark.skipif(find_spec("comet_ml") is not None, reason="comet_ml is to be missing"),
        ),
    ],
)
def test_what_lightning_refuses_is_told_in_one_line(given: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config=configs/elsa.yaml", given])
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1 and last.startswith("elsa: error: ") and told in last


def test_a_run_without_an_end_is_refused_with_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning would train for 1000 epochs, and nothing would be pruned."""
    with pytest.raises(SystemExit):
        main(["fit"])
    assert "nothing says how long to train: give --config configs/elsa.yaml" in capsys.readouterr().err


class Stop(Callback):
    """Ends a run before it begins, and remembers its callbacks."""

    seen: ClassVar[list[Callback]] = []

    def setup(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        Stop.seen = list(trainer.callbacks)  # type: ignore[attr-defined]
        raise UserError("stop here")


def callbacks_of(*arguments: str) -> list[ElsaCallback]:
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_steps=4",
              *arguments, "--trainer.callbacks+=tests.test_cli.Stop"])  # fmt: skip
    return [callback for callback in Stop.seen if isinstance(callback, ElsaCallback)]


def test_the_callback_has_options_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (alone,) = callbacks_of("--elsa.sparsity=0.7", "--elsa.ignore=[down_proj]")
    assert alone.constraint == Unstructured(0.7) and alone.ignore == ["down_proj"]
    (over,) = callbacks_of("--config=configs/elsa_l.yaml", "--elsa.sparsity=0.7")
    assert over.constraint == Unstructured(0.7) and over.state_dtype == "float8_e4m3fn"
    (listed,) = callbacks_of("--config=callbacks/elsa_l.yaml", "--trainer.callbacks.sparsity=0.7")
    assert listed.constraint == Unstructured(0.7) and listed.state_dtype == "float8_e4m3fn"
    scope = "--elsa.constraint={class_path: elsa_lightning.Unstructured, init_args: {sparsity: 0.8, scope: model}}"
    (whole,) = callbacks_of(scope)
    assert whole.constraint == Unstructured(0.8, scope="model")
    Stop.seen = []
    assert callbacks_of() == []  # a dense model may be trained, if its length is given
    capsys.readouterr()
    assert callbacks_of("--config=callbacks/elsa.yaml", "--elsa.ramp=0.2") == []
    assert "elsa.ramp asks for an ElsaCallback beside the one under trainer.callbacks" in capsys.readouterr().err
    assert callbacks_of("--elsa.ramp=0.2") == []
    assert "give sparsity (a fraction, such as 0.9) or constraint" in capsys.readouterr().err


NEEDED = {"bits": "4", "n": "2", "m": "4", "fraction": "0.5", "sparsity": "0.5", "keep": "1e6"}
CALLBACKS = [getattr(elsa_lightning.callbacks, name) for name in elsa_lightning.callbacks.__all__]
SETS = [c for c in vars(elsa_lightning.sets).values() if hasattr(c, "support") and not inspect.isabstract(c)]


@pytest.mark.parametrize("kind", [*CALLBACKS, *SETS], ids=lambda kind: kind.__name__)
def test_every_optional_argument_takes_null_inside_a_list_of_callbacks(
    kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    """This includes values that one parser has read and passes on in Python's notation."""
    place, given = "--trainer.callbacks", [f"--trainer.callbacks+=elsa_lightning.callbacks.{kind.__name__}"]
    if kind in SETS:
        place = "--trainer.callbacks.constraint"
        given = ["--trainer.callbacks+=elsa_lightning.ElsaCallback", f"{place}=elsa_lightning.sets.{kind.__name__}"]
    parameters = inspect.signature(kind).parameters.values()
    for p in parameters:
        if p.default is p.empty:
            given += [
                f"{place}.{p.name}",
                NEEDED.get(p.name, '{"attn": {class_path: Layers, init_args: {fraction: 0.5}}}'),
            ]
    optional = [p.name for p in parameters if p.default is not p.empty and "None" in str(p.annotation)]
    for name in optional:
        given += [f"{place}.{name}", "null"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *given, "--print_config"])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    found = yaml.safe_load(printed.out)["trainer"]["callbacks"][-1]["init_args"]
    found = found["constraint"]["init_args"] if kind in SETS else found
    assert [found[name] for name in optional] == [None] * len(optional)


def test_null_and_lists_and_sets_inside_sets_can_be_given_inside_a_list_of_callbacks() -> None:
    place = "--trainer.callbacks.constraint"
    inside = "{class_path: elsa_lightning.Quantized, init_args: {bits: 3, group_size: null, inside: null}}"
    one = "--trainer.callbacks+=elsa_lightning.ElsaCallback"
    (pattern,) = callbacks_of(one, f"{place}=elsa_lightning.ByPattern", f"{place}.sets={{mlp: {inside}}}")
    assert pattern.constraint == ByPattern({"mlp": Quantized(3)})
    grid = [f"{place}=elsa_lightning.Quantized", f"{place}.bits=4", f"{place}.inside=elsa_lightning.NM"]
    numbers = [f"{place}.inside.n=2", f"{place}.inside.m=4", f"{place}.group_size=null"]
    (both,) = callbacks_of(one, *grid, *numbers, "--trainer.callbacks.targets=[up_proj, down_proj]")
    assert both.constraint == Quantized(4, inside=NM(2, 4)) and both.targets == ["up_proj", "down_proj"]
    (whole,) = callbacks_of(one, *grid, *numbers, f"{place}.inside=null")
    assert whole.constraint == Quantized(4)


def test_a_printed_configuration_means_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for config in ("configs/elsa_l.yaml", "callbacks/elsa_l.yaml"):
        with pytest.raises(SystemExit):
            main(["fit", f"--config={config}", "--print_config"])
        (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
        (callback,) = callbacks_of(f"--config={tmp_path / 'printed.yaml'}")
        assert callback.constraint == Unstructured(0.9) and callback.state_dtype == "float8_e4m3fn"


def test_a_log_shows_progress_in_lines(
    tiny_llama: str,
    token_cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("elsa_lightning.training.LineProgress", lambda: LineProgress(seconds=0))
    main([*small_run(tiny_llama, token_cache, tmp_path), "--trainer.val_check_interval=2"])
    printed = capsys.readouterr().out
    assert re.search(r"^step 1 of 2, [\d.]+ % zeros, [\w ]+, loss \d[\d.]*, \d+ s left$", printed, re.M)
    assert re.search(r"^validated after step 2, 90.0 % zeros, mask fixed, .*perplexity \d", printed, re.M)
    assert re.search(r"^step 2 of 2, ", printed, re.M) and "\r" not in printed


class TheirData(LightningDataModule):
    """Batches of somebody else's: token ids with labels."""

    def __init__(self, length: int = 8) -> None:
        super().__init__()
        self.length = length

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        ids = torch.randint(2048, (16, self.length), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": one, "labels": one} for one in ids], batch_size=4)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


def test_any_data_module_can_be_given(tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"--model.name={tiny_llama}", "--trainer.accelerator=cpu", "--elsa.sparsity=0.5"]
    run = [*common, "--trainer.max_steps=4", f"--trainer.default_root_dir={tmp_path}",
           "--trainer.callbacks+=elsa_lightning.callbacks.SaveHuggingFace"]  # fmt: skip
    theirs = ["--data=tests.test_cli.TheirData", "--data.length=12"]
    main(["fit", *run, *theirs])
    printed = capsys.readouterr().out
    weights = select(AutoModelForCausalLM.from_pretrained(next(tmp_path.rglob("hf")))).parameters.values()
    assert sum(int((p == 0).sum()) for p in weights) == round(0.5 * sum(p.numel() for p in weights))
    (test,) = re.findall(r"^  (?:elsa|python -m elsa_lightning) (test .*)$", printed, re.M)
    main([*test.split(), "--trainer.logger=false"])  # the saved configuration names the class too
    assert "test/perplexity" in capsys.readouterr().out
    main(["plan", *common, *theirs])
    assert "batches of unknown size" in capsys.readouterr().out
    (tmp_path / "theirs.yaml").write_text("data: {class_path: tests.test_cli.TheirData, init_args: {length: 100}}")
    with pytest.raises(SystemExit):
        main(["fit", *run, f"--config={tmp_path / 'theirs.yaml'}"])
    assert "sequences of 100 tokens" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for words in (
        "--elsa.sparsity",
        "Fraction of zeros",
        "--model.gradient_checkpointing",
        "Recompute activations",
        "--data.seq_len",
        "Tokens a sequence",
        "elsa_lightning.NM,",
    ):
        assert words in printed
    assert not re.search(r"elsa_lightning\.\w+\.\w*Zeros", printed)  # KeepMask's, not one to choose


HEAVY = {"torch", "numpy", "lightning", "torchmetrics", "transformers", "datasets", "bitsandbytes", "tensorboard"}
NO_RUN = HEAVY - {"torch", "numpy"}


@pytest.mark.parametrize(
    ("code", "left_out"),
    [
        ("import elsa_lightning; dir(elsa_lightning)", HEAVY),
        ("import elsa_lightning.admm, elsa_lightning.selection, elsa_lightning.export", NO_RUN),
        ("from elsa_lightning import ADMM, KeptZeros, Unstructured, project, sparsity", NO_RUN),
        ("elsa --help", HEAVY),
        ("elsa --version", HEAVY),
        ("elsa nothing", HEAVY),
        ("elsa sparsity --help", HEAVY),
        ("elsa export --help", HEAVY),
        ("elsa evaluate --help", HEAVY),
        ("elsa evaluate nowhere --perplexity pydocs --output /no/where", HEAVY),
        ("elsa export --from nowhere --to hf --output {}/out", NO_RUN),
        ("elsa sparsity {}", NO_RUN),
        ("elsa fit --help", {"datasets", "bitsandbytes", "tensorboard"}),  # Lightning's torchmetrics loads transformers
    ],
)
def test_no_more_is_loaded_than_is_needed(code: str, left_out: set[str], tiny_llama: str) -> None:
    if code.startswith("elsa"):
        arguments = code.format(tiny_llama).split()[1:]
        code = f"from elsa_lightning.cli import main\ntry: main({arguments})\nexcept SystemExit: pass"
    code += f"\nimport sys\nfound = {left_out} & set(sys.modules)\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(
    "package", [elsa_lightning, elsa_lightning.export, elsa_lightning.evaluation], ids=lambda package: package.__name__
)
def test_type_checkers_see_the_names_that_load_when_used(package: ModuleType) -> None:
    (block,) = [node for node in ast.parse(inspect.getsource(package)).body if isinstance(node, ast.If)]
    seen = [name.name for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(seen) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__name__ == name


def test_help_lists_every_command_with_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, printed.splitlines())) <= 80
    described = set(re.findall(r"^  (\w+)   +\w", printed, re.M))
    assert described == {*ElsaCLI.subcommands(), *cli.WITHOUT_TRAINER} and {*cli.OF_A_TRAINER} == {
        *ElsaCLI.subcommands()
    }
    examples = re.findall(r"^  elsa (\w.*)$", printed.replace("\\\n", " "), re.M)
    assert len(examples) > 4
    for example in examples:
        arguments = example.split()
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--print_config" if arguments[0] in cli.OF_A_TRAINER else "--help"])
        assert end.value.code == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "give a command; there are evaluate, export, fit,"),
        ("fti", "unknown command: fti; did you mean fit?"),
        ("prune", "unknown command: prune; there are evaluate, export, fit,"),
        ("sparsity model --jsno", "unrecognized argument: --jsno; did you mean --json?"),
        ("sparsity", "the following arguments are required: path"),
        ("export --from x --to hf --outptu y", "did you mean --output?"),
    ],
)
def test_a_mistyped_command_is_told_in_one_line(given: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(given.split())
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("elsa: error: ") and printed.count("\n") == 1 and told in printed


def test_only_errors_made_for_users_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistake() -> None:
        raise UserError("say this")

    def fault() -> None:
        [].remove("a ValueError of our own code")

    for action, expected in ((mistake, SystemExit), (fault, ValueError)):
        monkeypatch.setattr("elsa_lightning.training.ElsaCLI", lambda *args, action=action, **kwargs: action())
        with pytest.raises(expected):
            main(["fit"])
    assert capsys.readouterr().err == "elsa: error: say this\n"


def test_every_error_that_the_package_raises_on_purpose_is_made_for_users() -> None:
    package = Path(elsa_lightning.__file__).parent
    raised = {name for file in package.rglob("*.py") for name in re.findall(r"raise (\w+)\(", file.read_text())}
    of_python = {"AttributeError", "TypeError", "SystemExit"}
    assert raised <= {"UserError", "UnavailableError"} | of_python
    error = pickle.loads(pickle.dumps(UnavailableError("gone")))  # as another process hands it over
    assert isinstance(error, (ValueError, OSError)) and str(error) == "gone"


@pytest.mark.parametrize("given", [None, "last", "registry:model:version:1"])
def test_checkpoints_that_lightning_finds_by_itself_are_left_to_it(given: str | None) -> None:
    check_checkpoint(given, Trainer(accelerator="cpu", logger=False))


@pytest.mark.parametrize("processes", [0, 1])
def test_a_run_over_processes_leaves_once_all_else_has_ended(processes: int, tmp_path: Path) -> None:
    """Without the interpreter's end, in which threads of torch abort now and then."""
    (tmp_path / "ends.py").write_text(
        "import atexit, sys\n"
        "import torch.distributed as dist\n"
        "from elsa_lightning import cli, training\n"
        "class Last:\n"
        "    def __del__(self):\n"
        "        print('the interpreter ended')\n"
        "def run(arguments, from_shell):\n"
        "    if int(sys.argv[2]):\n"
        "        dist.init_process_group('gloo', init_method=f'file://{sys.argv[3]}', rank=0, world_size=1)\n"
        "    atexit.register(print, 'a logger ended')\n"
        "training.run = run\n"
        "last = Last()\n"
        "cli.command()\n"
    )
    command = [sys.executable, "ends.py", "fit", str(processes), str(tmp_path / "store")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, capture_output=True, text=True
    )
    expected = ["a logger ended"] if processes else ["a logger ended", "the interpreter ended"]
    assert done.returncode == 0 and done.stdout.splitlines() == expected, done.stderr

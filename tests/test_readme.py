"""What the READMEs show is executed; what takes long or needs a network goes through the real parsers only."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import nn
from torch.utils.data import DataLoader

from elsa_lightning import sweep
from elsa_lightning.cli import main

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "callbacks/README.md", *sorted(ROOT.glob("docs/*.md"))]


RUN_ELSEWHERE = {  # by tests of their own
    "python": [ROOT / "docs/integrations.md", ROOT / "docs/story.md"],
    "bash": [ROOT / "docs/story.md"],
}


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of all READMEs, each once."""
    pages = [page for page in READMES if page not in RUN_ELSEWHERE[language]]
    found = [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)]
    return list(dict.fromkeys(found))


COMMANDS = list(dict.fromkeys(line for block in blocks("bash") for line in block.splitlines()))


def commands(*start: str) -> list[str]:
    return [line for line in COMMANDS if shlex.split(line)[: len(start)] == list(start)]


SPARSITY, REPORT, SWEEP = (commands("elsa", name) for name in ("sparsity", "report", "sweep"))


def elsa_commands() -> list[str]:
    own = [*SPARSITY, *REPORT, *SWEEP]
    return [*(line for line in commands("elsa") if line not in own), *commands("torchrun")]


def zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


def test_every_command_is_of_a_kind_that_is_checked_here() -> None:
    of_runs = [*SPARSITY, *REPORT, *SWEEP]
    checked = [*commands("make"), *elsa_commands(), *of_runs, *commands("python", "train.py"), *benchmark_commands()]
    assert sorted(checked) == sorted(COMMANDS)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str, text_file: Path
) -> None:
    if "ZeroShot" in block:
        pytest.importorskip(
            "lm_eval.tasks", reason="lm-eval is not installed (the extra evaluate)", exc_type=ImportError
        )
    monkeypatch.chdir(tmp_path)
    shutil.copy(text_file, tmp_path / "held_out.txt")
    shutil.copytree(tiny_llama, tmp_path / "runs/elsa/lightning_logs/version_0/hf")  # where the demo leaves its model
    torch.manual_seed(0)
    theirs, model = BoringModel(), nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
    their_sparse, sparse = BoringModel(), nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():
        for layer in (their_sparse.layer, sparse[0]):
            layer.weight[:, 2:] = 0  # type: ignore[index]
    if "sparse_model" in block:
        model = sparse
    names = {
        "your_sparse_module": their_sparse,
        "sparse_model": sparse,
        "your_module": theirs,
        "your_data": DataLoader(RandomDataset(32, 64)),
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-3),
        "batches": torch.randn(40, 4, 32).unbind(),
        "loss": lambda model, batch: F.mse_loss(model(batch), batch[:, :2]),
    }
    exec(compile(block, "README.md", "exec"), names)
    if "sparse_model" in block:
        assert not sparse[0].weight[:, 2:].any() and sparse[0].weight[:, :2].all()
    if "your_sparse_module" in block:
        assert not their_sparse.layer.weight[:, 2:].any() and their_sparse.layer.weight[:, :2].all()
    if "your_module" in block:
        assert zeros(theirs.layer.weight) == pytest.approx(0.9, abs=0.01)
    if "admm.finish()" in block and "select(model)" in block:
        both = torch.cat([layer.weight.flatten() for layer in (model[0], model[2])])
        assert zeros(both) == pytest.approx(0.9, abs=0.01)
    if "from_pretrained" in block:
        assert names["model"].num_parameters() > 0


@pytest.mark.parametrize("command", elsa_commands())
def test_elsa_command_parses(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        arguments = shlex.split(command)  # elsa ..., or torchrun ... -m elsa_lightning ...
        start = arguments.index("elsa_lightning") if arguments[0] == "torchrun" else 0
        ends = ["--print_config"] if "help" not in command else []  # help ends by itself
        if arguments[start + 1] in ("export", "evaluate"):  # no configuration: arguments are looked at before help
            ends = ["--help"]
        main([*(a for a in arguments[start + 1 :] if a != "--print_config"), *ends])
    assert exit_.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", SPARSITY)
def test_sparsity_command_counts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "runs/elsa/lightning_logs/version_0/hf")
    main(shlex.split(command)[1:])
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out


@pytest.mark.parametrize("command", REPORT)
def test_report_command_writes_a_page(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed (the extra report)")
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[1:]
    if "--help" in arguments:
        with pytest.raises(SystemExit):
            main(arguments)
        assert "examples:" in capsys.readouterr().out
        return
    for folder in ("runs/elsa/lightning_logs/version_0", "exports/cpu"):
        Path(folder).mkdir(parents=True)
        Path(folder, "elsa_run.json").write_text('{"status": "finished", "tensors": {"0.weight": [1, 10, 0, 1]}}')
    main(arguments)
    (page,) = tmp_path.rglob("*.html")
    found = json.loads(page.with_suffix(".json").read_text())["runs"]
    assert found and all(one["sparsity"] == 0.9 for one in found)


@pytest.mark.parametrize("command", SWEEP)
def test_sweep_command_gives_fit_what_it_takes(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    given, others = sweep.parser().parse_known_args(shlex.split(command)[2:])
    assert given.sparsity
    with pytest.raises(SystemExit) as end:
        main(["fit", *others, "--elsa.sparsity", given.sparsity[0], "--print_config"])
    assert end.value.code == 0, capsys.readouterr().err


THEIR_SCRIPT = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

LightningCLI(BoringModel, BoringDataModule)
"""
THEIR_CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 20
  enable_progress_bar: false
  callbacks: [{class_path: lightning.pytorch.callbacks.ModelSummary}]
"""


@pytest.mark.parametrize("command", commands("python", "train.py"))
def test_command_prunes_somebody_elses_pipeline(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "callbacks", tmp_path / "callbacks")
    (tmp_path / "train.py").write_text(THEIR_SCRIPT)
    (tmp_path / "train.yaml").write_text(THEIR_CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    runpy.run_path("train.py", run_name="__main__")
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    weight = torch.load(checkpoint, weights_only=True)["state_dict"]["layer.weight"]
    expected = re.search(r"sparsity=([\d.]+)", command)
    if "nm.yaml" in command or "quantized.yaml" in command:  # small weights of a grid are zero, too
        assert int((weight.view(-1, 4) != 0).sum(dim=1).max()) <= 2
        assert "quantized" in command or zeros(weight) == 0.5
        return
    assert zeros(weight) == pytest.approx(float(expected[1]) if expected else 0.9, abs=0.01)


def benchmark_commands() -> list[str]:
    return [line for line in commands("python") if "benchmarks/" in line]


@pytest.mark.parametrize("command", benchmark_commands())
def test_benchmark_command_names_a_script_and_options_it_has(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *arguments = shlex.split(command)[1:]
    assert (ROOT / script).is_file()
    options = [argument for argument in arguments if argument.startswith("--")]
    if not options:  # a folder that exists is all it takes
        assert all((ROOT / argument).is_dir() for argument in arguments)
        return
    monkeypatch.syspath_prepend((ROOT / script).parent)
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert exit_.value.code == 0
    described = capsys.readouterr().out
    assert all(option in described for option in options)


@pytest.mark.parametrize("command", commands("make"))
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_target_exists(command: str) -> None:
    subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_named_configurations_exist(readme: Path) -> None:
    text = readme.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (readme.parent / target).exists(), target
    for pattern in re.findall(r"(?:configs|callbacks|benchmarks)/[\w./{},-]*\w\.(?:yaml|py|md)", text):
        head, _, rest = pattern.partition("{")
        choices, _, tail = rest.partition("}")
        for choice in choices.split(","):
            assert (ROOT / f"{head}{choice}{tail}").is_file(), pattern

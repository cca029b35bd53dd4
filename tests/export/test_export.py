"""elsa export: from runs, checkpoints and other people's folders, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM, AutoTokenizer

from elsa_lightning.callbacks import SaveHuggingFace
from elsa_lightning.cli import main
from elsa_lightning.export import export, write
from elsa_lightning.export.folders import new_folder, zeros_in, zeros_of
from elsa_lightning.export.project import read_set
from elsa_lightning.sets import NM, ByPattern, Unstructured
from tests.callbacks.tiny import At, every_step, stop
from tests.export.models import IDS, run, sparse_folder, zeros

pytestmark = pytest.mark.filterwarnings("ignore:Elsa:UserWarning", "ignore:From a checkpoint:UserWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """The folder of a run with all of its checkpoints, and a model."""
    folder = tmp_path_factory.mktemp("run")
    run(tiny_llama, folder, every_step(folder / "checkpoints"), SaveHuggingFace(str(folder / "hf")))
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    return sparse_folder(tiny_llama, tmp_path_factory.mktemp("foreign") / "model", dtype=torch.bfloat16)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_the_saved_model_of_a_run_says_how_it_was_made(finished: Path, tiny_llama: str) -> None:
    record = json.loads((finished / "hf/elsa.json").read_text())
    assert record["base_model"] == tiny_llama
    assert record["method"][0]["constraint"] == "Unstructured(sparsity=0.75, scope='model')"
    assert record["method"][0]["steps"] == 12
    assert record["perplexity"].keys() == {"dense", "sparse", "protocol"}  # measured after the model was saved
    assert "converged" in record["convergence"]
    assert "Adam(lr=0.0002" in record["training"]["optimizer"]
    assert record["versions"]["torch"] == torch.__version__
    written = {name: (s["zeros"], s["entries"]) for name, s in record["sparsity"].items()}
    assert written == zeros_in(finished / "hf")
    assert record["sparse_matrices"]["zeros"] == pytest.approx(0.75 * record["sparse_matrices"]["entries"], rel=0.01)

    card = (finished / "hf/README.md").read_text()
    assert card.startswith("---\n") and "library_name: transformers" in card
    assert f"| sparse | {record['perplexity']['sparse']:.3f} |" in card
    block = [one for name, one in record["sparsity"].items() if ".layers.1." in name]
    share = sum(one["zeros"] for one in block) / sum(one["entries"] for one in block)
    assert len(block) == 7 and 0.7 < share < 0.8 and f"| block 1 | 7 | {100 * share:.1f} % |" in card


@pytest.mark.parametrize("where", ["", "hf", "checkpoints/12.ckpt"])
def test_a_run_and_its_last_checkpoint_export_the_same_model(where: str, finished: Path, tmp_path: Path) -> None:
    export(finished / where, "hf", tmp_path / "out", fresh=where == "", say=lambda line: None)
    exported, trained = load(tmp_path / "out").state_dict(), load(finished / "hf").state_dict()
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    record = json.loads((tmp_path / "out/elsa.json").read_text())
    assert record["method"] == json.loads((finished / "hf/elsa.json").read_text())["method"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("def f(x)") == AutoTokenizer.from_pretrained(
        finished / "hf"
    )("def f(x)")


@pytest.mark.parametrize("strategy", ["auto", "sharded"])
def test_a_checkpoint_is_exported_in_the_dtype_that_was_given_sharded_or_not(
    strategy: str, tiny_llama: str, tmp_path: Path
) -> None:
    given = sparse_folder(tiny_llama, tmp_path / "given", sparsity=0, dtype=torch.bfloat16)
    chosen: Any = strategy
    if strategy == "sharded":
        chosen = ModelParallelStrategy(1, 1, process_group_backend="gloo")
    saver = SaveHuggingFace(str(tmp_path / "hf"))
    run(str(given), tmp_path, every_step(tmp_path / "checkpoints"), saver, strategy=chosen)
    assert (tmp_path / "checkpoints/12.ckpt").is_dir() == (strategy == "sharded")
    export(tmp_path / "checkpoints/12.ckpt", "hf", tmp_path / "out", fresh=False, say=lambda line: None)
    exported, trained = load(tmp_path / "out"), load(tmp_path / "hf")
    assert exported.dtype == trained.dtype == torch.bfloat16
    assert all(torch.equal(exported.state_dict()[name], t) for name, t in trained.state_dict().items())
    export(tmp_path / "checkpoints/5.ckpt", "hf", tmp_path / "middle", fresh=False, say=lambda line: None)
    assert sum(zeros(load(tmp_path / "middle")).values()) == sum(zeros(trained).values())
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_checkpoint_of_the_middle_is_projected_as_its_run_would_have_done_and_says_so(
    finished: Path, tiny_llama: str, tmp_path: Path
) -> None:
    told: list[str] = []
    export(finished / "checkpoints/5.ckpt", "hf", tmp_path / "out", fresh=False, say=told.append)
    assert json.loads((tmp_path / "out/elsa.json").read_text())["run"] == str(finished.resolve())  # for a report
    assert any("step 5 of 12" in line and "projected onto Unstructured(sparsity=0.75" in line for line in told)
    assert "projected onto" in (tmp_path / "out/README.md").read_text()

    # a run that is ended there leaves the same
    run(tiny_llama, tmp_path, At(5, stop), SaveHuggingFace(str(tmp_path / "ended")))
    exported, left = load(tmp_path / "out").state_dict(), load(tmp_path / "ended").state_dict()
    assert all(torch.equal(exported[name], left[name]) for name in left)
    raw = torch.load(finished / "checkpoints/5.ckpt", weights_only=True)["state_dict"]
    assert (
        zeros_in(tmp_path / "out")
        == zeros_in(tmp_path / "ended")
        != zeros_of({name.removeprefix("model."): t for name, t in raw.items() if not name.endswith("lm_head.weight")})
    )


def test_a_folder_of_somebody_elses_is_exported_as_it_was_given(foreign: Path, tmp_path: Path) -> None:
    main(["export", "--from", str(foreign), "--to", "hf", "--output", str(tmp_path / "out")])
    theirs, ours = load(foreign), load(tmp_path / "out")
    assert ours.dtype == torch.bfloat16
    assert torch.equal(theirs(IDS).logits, ours(IDS).logits) and zeros(theirs) == zeros(ours)
    record = json.loads((tmp_path / "out/elsa.json").read_text())
    assert not {"method", "perplexity", "data", "convergence", "command", "training"} & record.keys()  # not known
    assert "Pruned with" not in (tmp_path / "out/README.md").read_text()


def test_what_cannot_be_exported_is_refused_in_one_line(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/.metadata").touch()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").touch()
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    out = str(tmp_path / "out")
    for arguments, message in (
        ([tmp_path / "nothing", "hf", out], "does not exist"),
        ([tmp_path / "shards", "hf", out], "is no whole checkpoint"),
        ([tmp_path / "thesis", "hf", out], "has no config.json of a model"),
        ([tmp_path / "other.ckpt", "hf", out], "no checkpoint of Lightning"),
        ([foreign, "hf", tmp_path / "thesis"], "holds 'thesis.tex'"),
        ([foreign, "hf", foreign], "is the folder to export"),
    ):
        with pytest.raises(SystemExit):
            main([*["export", "--from"], str(arguments[0]), "--to", str(arguments[1]), "--output", str(arguments[2])])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("wrong", ["logits", "zeros"])
def test_what_does_not_give_the_model_back_is_not_kept(
    wrong: str, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(source: Any, folder: Path, options: Any, say: Any) -> Any:
        made = write._hf(source, folder, options, say)
        return write.replace(
            made, **({"logits": made.logits + 1} if wrong == "logits" else {"sparsity": {"x": (1, 2)}})
        )

    export(foreign, "hf", tmp_path / "out", fresh=False, say=lambda line: None)
    before = (tmp_path / "out/model.safetensors").stat().st_ino
    monkeypatch.setitem(write.WRITERS, "hf", spoilt)
    with pytest.raises(ValueError, match="what was written"):
        export(foreign, "hf", tmp_path / "out", fresh=False, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/model.safetensors").stat().st_ino == before


REPLACE = """
import sys
from pathlib import Path
from elsa_lightning.export.folders import new_folder

for number in range(1, 100000):
    with new_folder(Path(sys.argv[1])) as whole:
        for name in ("a.json", "b.json"):
            (whole / name).write_text(str(number))
    print(number, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged in one step on Linux")
def test_a_kill_at_any_moment_leaves_the_whole_old_or_the_whole_new(tmp_path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", REPLACE, str(tmp_path / "out")], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        for _ in range(200):  # whoever looks meanwhile finds one, too
            assert (tmp_path / "out/b.json").read_text()
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert (tmp_path / "out/a.json").read_text() == (tmp_path / "out/b.json").read_text()


def test_a_failure_while_writing_leaves_the_former_folder_and_nothing_else(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as whole:
        (whole / "config.json").write_text("{}")
    with pytest.raises(OSError, match="full"), new_folder(tmp_path / "out") as whole:
        (whole / "config.json").write_text("[")
        raise OSError("full")
    assert (tmp_path / "out/config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "constraint",
    [
        Unstructured(0.9),
        Unstructured(keep=30, scope="model", ceiling=0.5),
        NM(2, 4),
        ByPattern({"attn|q": NM(2, 4), "mlp": Unstructured(0.5, "tensor", depth=0.1)}),
    ],
)
def test_a_set_is_read_back_from_its_name(constraint: Any) -> None:
    assert read_set(repr(constraint)) == constraint


def test_a_name_that_is_no_set_runs_nothing() -> None:
    for text in ("__import__('os').getcwd()", "Unstructured(__import__('os'))", "Mine(1)", "1", "NM(", "print('x')"):
        with pytest.raises(ValueError, match="is none that can be made from its name"):
            read_set(text)

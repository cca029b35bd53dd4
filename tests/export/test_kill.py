"""A kill at any moment leaves the whole old export or the whole new one, and nothing for long."""

import os
import select
import shutil
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from elsa_lightning.export import Options, export
from elsa_lightning.export.folders import archive_of, beside, new_folder
from tests.export.models import sparse_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged in one step on Linux")


def killed(call: Callable[[], Any], parent: Path, moment: int) -> int | None:
    """Call in a process that is killed when it touches files below a folder for so many times; 0 is never.

    Returns:
        How many times it did, if it came to its end.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # the others are not forked, and would be waited for
        seen = 0

        def watch(event: str, arguments: Any) -> None:
            nonlocal seen
            paths = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
            if event.startswith(("open", "os.", "shutil.")) and any(path.startswith(str(parent)) for path in paths):
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            call()
            os.write(writing, str(seen).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        if not select.select([said], [], [], 120)[0]:  # a lock that another thread held while forking is never released
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return killed(call, parent, moment)
        told = said.read()
    _, status = os.waitpid(process, 0)
    assert told or os.WIFSIGNALED(status), "it failed by itself"
    return int(told) if told else None


def content(folder: Path) -> dict[str, Any]:
    """Return what is in a folder; tensors by name, as their order in a file may differ."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            found |= {f"{file.name}/{name}": tensors[name].view(torch.uint8).numpy().tobytes() for name in tensors}
        elif file.is_file():
            found[file.name] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> list[Path]:
    """Two models with empty neurons, alike but for their weights."""
    from transformers import AutoModelForCausalLM

    made = []
    for name, scale in (("old", 1.0), ("new", 2.0)):
        folder = sparse_folder(tiny_llama, tmp_path_factory.mktemp("models") / name)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(scale)
                layer.mlp.down_proj.weight[:, ::2] = 0
                layer.mlp.gate_proj.weight[::2] = 0
                layer.mlp.up_proj.weight[::2] = 0
        model.save_pretrained(folder)
        made.append(folder)
    return made


@pytest.mark.parametrize("to", ["hf", "shrunk", "quantized", "cpu-sparse", "gguf"])
def test_a_killed_export_leaves_the_old_or_the_new(to: str, models: list[Path], tmp_path: Path) -> None:
    options = Options(4, 16)
    if to == "gguf":
        if find_spec("gguf") is None:
            pytest.skip("gguf is not installed")
        from tests.export.test_blocks import CONVERTER

        (tmp_path / "convert.py").write_text(CONVERTER)
        options = Options(gguf_type="f32", converter=str(tmp_path / "convert.py"))
    place = tmp_path / "exports"
    whole: dict[str, dict[str, Any]] = {}

    def write(model: Path, output: str) -> None:
        export(model, to, place / output, options=options, fresh=False, say=lambda line: None)

    for model in models:
        write(model, model.name)
        whole[model.name] = content(place / model.name)
    assert whole["old"].keys() == whole["new"].keys() and whole["old"] != whole["new"]

    def again(moment: int) -> int | None:
        shutil.rmtree(place / "out", ignore_errors=True)
        shutil.copytree(place / "old", place / "out")
        touched = killed(lambda: write(models[1], "out"), place, moment)
        assert content(place / "out") in (whole["old"], whole["new"]), moment
        return touched

    touches = again(0)
    assert touches and content(place / "out") == whole["new"]
    moments = [touches // 4, touches // 2, touches - 12, touches - 1]
    for moment in moments[3:] if to == "gguf" else moments:
        assert again(moment) is None
    assert any(path.name.startswith(".out.elsa-") for path in place.iterdir())  # the last one left something
    write(models[1], "out")
    assert {path.name for path in place.iterdir()} == {"old", "new", "out"}
    assert content(place / "out") == whole["new"]


def test_a_killed_exchange_leaves_no_archive_of_another_model(tmp_path: Path) -> None:
    place = tmp_path / "exports"

    def write(word: str) -> None:
        with new_folder(place / "out") as whole:
            for name in ("config.json", "model.safetensors"):
                (whole / name).write_text(word)
            archive_of(whole).write_text(word)

    moment = 0
    touched = None
    while touched is None or moment == 1:  # moment 0 is never
        write("old")
        touched = killed(lambda: write("new"), place, moment)
        words = {(place / "out" / name).read_text() for name in ("config.json", "model.safetensors")}
        assert words in ({"old"}, {"new"})
        if archive_of(place / "out").exists():
            assert {archive_of(place / "out").read_text()} == words, moment
        moment += 1
    assert moment > 10
    write("old")
    assert {path.name for path in place.iterdir()} == {"out", "out.tar.zst"}


def test_folders_of_processes_that_live_and_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out-mineown1").mkdir()  # like one of ours by chance
    with beside(tmp_path / "out") as one, beside(tmp_path / "out") as two:
        assert one != two and one.is_dir() and two.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [".out-mineown1"]


def test_a_former_folder_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    def die() -> None:
        with beside(tmp_path / "out") as place:  # where names cannot be exchanged
            (tmp_path / "out").rename(place / "former")
            os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").touch()
    assert killed(die, tmp_path, 0) is None and not (tmp_path / "out").exists()
    with beside(tmp_path / "out"):
        assert (tmp_path / "out/config.json").exists()

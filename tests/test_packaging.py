"""The wheel holds what the command line needs away from a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import elsa_lightning

ROOT = Path(__file__).parents[1]
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    """Return the standard output of a Python command that must succeed."""
    variables = {**os.environ, **OFFLINE, **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), ".", cwd=ROOT)
    (built,) = folder.glob("elsa_lightning-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing in it but the installed wheel."""
    folder = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel), cwd=folder)
    return folder


def test_wheel_holds_code_model_and_configurations_and_nothing_else(wheel: Path) -> None:
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "elsa_lightning").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    configs = {f"elsa_lightning/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "configs").rglob("*.yaml")}
    fragments = {f"elsa_lightning/configs/callbacks/{file.name}" for file in (ROOT / "callbacks").glob("*.yaml")}
    assert packaged == package | configs | fragments
    assert {f"elsa_lightning/models/pydocs-2m/{name}" for name in ("config.json", "tokenizer.json")} <= packaged


def test_installed_command_finds_its_configuration_and_model(installed: Path, tmp_path: Path) -> None:
    printed = run(
        "-m", "elsa_lightning", "fit", "--config", "configs/elsa.yaml", "--print_config",
        cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    assert yaml.safe_load(printed)["model"]["name"] == "pydocs-2m"
    folder = run(
        "-c", "from elsa_lightning.lm import model_path; print(model_path('pydocs-2m'))",
        cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    assert Path(folder.strip()) == installed / "elsa_lightning/models/pydocs-2m"


def test_installed_script_runs(installed: Path, tmp_path: Path) -> None:
    said = run(str(installed / "bin" / "elsa"), "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.strip() == f"elsa {elsa_lightning.__version__}"


def test_installed_metadata_names_python_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: MIT" in metadata

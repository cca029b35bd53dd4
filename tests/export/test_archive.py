"""--archive: one compressed file that gives the folder back."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from elsa_lightning.errors import UserError
from elsa_lightning.export import archive, export
from elsa_lightning.export.folders import archive_of, new_folder
from tests.export.models import sparse_folder


def quiet(line: str) -> None: ...


def test_the_archive_gives_the_folder_back(tiny_llama: str, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="--archive compresses with zstandard")
    source, told = sparse_folder(tiny_llama, tmp_path / "source"), list[str]()
    export(source, "hf", tmp_path / "out", archive=True, fresh=False, say=told.append)
    packed = (tmp_path / "out.tar.zst").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().stream_reader(packed).read())) as tar:
        tar.extractall(tmp_path / "there", filter="data")
    given = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "there/out").iterdir()} == given
    before, after = sum(map(len, given.values())) / 1e6, len(packed) / 1e6
    assert after < before and told[-1] == f"archive: {tmp_path / 'out.tar.zst'}, {before:,.1f} → {after:,.1f} MB"

    export(source, "hf", tmp_path / "out", fresh=False, say=told.append)
    assert told[-1] == f"{tmp_path / 'out.tar.zst'} is of an earlier export: give --archive to write it anew."


def test_what_is_read_back_must_be_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zstandard", reason="--archive compresses with zstandard")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("a")

    class Growing(tarfile.TarFile):
        def close(self) -> None:
            (tmp_path / "out/a").write_text("b")
            super().close()

    opened: Any = tarfile.open
    monkeypatch.setattr(archive.tarfile, "open", lambda *_, mode, **rest: Growing.open(mode=mode, **rest))
    with pytest.raises(UserError, match="does not give the files back"):
        archive.write_archive(tmp_path / "out", "out", tmp_path / "out.tar.zst")
    assert opened


def test_without_the_package_it_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.setattr(archive, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install zstandard"):
        export(tmp_path / "model", "hf", tmp_path / "out", archive=True, say=quiet)


def test_an_archive_is_never_of_another_model_than_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for word in ("one", "two"):
        with new_folder(folder) as whole:
            (whole / "config.json").write_text(word)
            archive_of(whole).write_text(word)
        assert (folder / "config.json").read_text() == archive_of(folder).read_text() == word
    with pytest.raises(OSError, match="full"), new_folder(folder) as whole:
        archive_of(whole).write_text("three")
        raise OSError("full")
    assert archive_of(folder).read_text() == "two" and {p.name for p in tmp_path.iterdir()} == {"out", "out.tar.zst"}

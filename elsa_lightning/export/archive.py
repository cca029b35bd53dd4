"""Writes a folder as one compressed file, for transport: zeros take little space in it."""

from __future__ import annotations

import hashlib
import tarfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from elsa_lightning.errors import UserError
from elsa_lightning.export.folders import archive_of

_LEVEL = 10  # of 1 to 19: higher levels take many times as long for a few percent


def check_archive(output: Path) -> None:
    """Raise UserError if an archive of a folder cannot be written."""
    if find_spec("zstandard") is None:
        raise UserError("--archive compresses with the package zstandard: pip install zstandard, or leave it out")
    if (place := archive_of(output)).is_dir():
        raise UserError(f"--archive writes {str(place)!r}, which is a folder: move it away")


def write_archive(folder: Path, name: str, file: Path) -> None:
    """Write a folder as a compressed tar file, and read it back.

    Args:
        folder: The folder.
        name: Name of the folder in the archive.
        file: The archive to write.

    Raises:
        UserError: The archive does not give back the files.
    """
    zstandard: Any = import_module("zstandard")
    made = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    with file.open("wb") as raw, made.stream_writer(raw) as out, tarfile.open(fileobj=out, mode="w|") as tar:
        tar.add(folder, arcname=name)
    files = {f"{name}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}
    read = zstandard.ZstdDecompressor()
    with file.open("rb") as given, read.stream_reader(given) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
        found = {member.name: _digest(tar.extractfile(member)) for member in tar if member.isfile()}
    if found != {packed: _digest(path.open("rb")) for packed, path in files.items()}:
        raise UserError(f"the archive of {str(folder)!r} does not give the files back, and is not kept")


def _digest(file: IO[bytes] | None) -> str:
    assert file is not None
    with file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]

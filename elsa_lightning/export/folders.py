"""Model folders: written atomically, and never in place of anything but a saved model."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from elsa_lightning.errors import UserError

try:
    import fcntl
except ImportError:  # not on Unix
    fcntl = None  # type: ignore[assignment]

ADAPTER = "adapter"  # folder of a PEFT adapter inside that of its base model
RECORD = "elsa.json"
CARD = "README.md"

_WRITTEN = re.compile(  # files written by save_pretrained of models and tokenizers, and by exports
    r"(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|preprocessor_config|elsa)\.json"
    r"|merges\.txt|(model|cpu_sparse)(-\d+-of-\d+)?\.(safetensors|safetensors\.index\.json|gguf)"
    r"|(tokenizer|spiece|sentencepiece[\w.]*)\.model|.*\.(jinja|spm)"
)
_WRITTEN_ADAPTER = re.compile(r"adapter_(config\.json|model\.safetensors)|README\.md")


def what_else(folder: Path) -> str | None:
    """Return the name of a file in a folder that does not belong to a model as this library writes it, or None."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return folder.name
    ours = (folder / RECORD).is_file()  # else the README may be the user's own
    for file in folder.iterdir():
        if file.name == ADAPTER and file.is_dir():
            others = [inner.name for inner in file.iterdir() if not _WRITTEN_ADAPTER.fullmatch(inner.name)]
        elif file.name == "chat_templates" and file.is_dir():
            others = [inner.name for inner in file.iterdir() if inner.suffix != ".jinja"]
        else:
            others = [] if _WRITTEN.fullmatch(file.name) or (ours and file.name == CARD) else [file.name]
        if others:
            return others[0]
    return None


def check_replaceable(folder: Path, argument: str) -> None:
    """Raise UserError if a folder cannot be written, or holds files other than a saved model's, which would be lost.

    Args:
        folder: The folder to write.
        argument: The argument that named it, for the message.
    """
    place = next((p for p in folder.absolute().parents if p.exists()), Path())
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "lets nobody write" if place.is_dir() else "is a file"
        raise UserError(f"{argument} {str(folder)!r} cannot be made, for {str(place)!r} {why}: give another folder")
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{argument} {str(folder)!r} is a link to a place that is not there: give another folder")
    if folder.exists() and (os.path.ismount(folder) or folder.resolve() == Path.cwd()):
        what = "a mount point" if os.path.ismount(folder) else "the current folder"
        raise UserError(f"{argument} {str(folder)!r} is {what}, which cannot be replaced: give one inside it")
    if (other := what_else(folder)) is not None:
        raise UserError(
            f"{argument} {str(folder)!r} exists and holds {other!r}, which is no part of a saved model and would be "
            f"lost; give an empty or a new folder"
        )


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces ``folder`` at the end, or is removed if the block raises.

    A file at ``archive_of(whole)`` becomes the folder's archive; an older archive is removed first, so that it never
    lies beside a new model.
    """
    with beside(folder) as temporary:
        whole = temporary / "whole"
        whole.mkdir()
        yield whole
        archive = archive_of(whole)
        if archive.exists():
            archive_of(folder).unlink(missing_ok=True)
        replace(whole, folder)
        if archive.exists():
            archive.replace(archive_of(folder))


def archive_of(folder: Path) -> Path:
    """Return the path of a folder's archive, beside the folder."""
    return folder.with_name(f"{folder.name}.tar.zst")


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """Yield a temporary hidden folder beside another; first clear those that killed processes left there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    for last in (False, False, True):
        made = tempfile.TemporaryDirectory(dir=folder.parent, prefix=_prefix(folder), ignore_cleanup_errors=True)
        with made as place:
            lock = _take(Path(place))
            if lock is None and not last and fcntl is not None:
                continue  # another process took it for an abandoned one
            try:
                yield Path(place)
            finally:
                shutil.rmtree(place)
                if lock is not None:
                    os.close(lock)
            return


def _prefix(folder: Path) -> str:
    return f".{folder.name}.elsa-"


def _clear(folder: Path) -> None:
    """Remove hidden folders whose processes are gone; restore a former folder that was not replaced."""
    for left in folder.parent.glob(f"{glob.escape(_prefix(folder))}*"):
        if (lock := _take(left)) is None:
            continue
        if (left / "former").is_dir() and not folder.exists():
            (left / "former").rename(folder)
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def _take(folder: Path) -> int | None:
    """Lock a folder and return a descriptor that holds the lock; None if it is locked already or does not exist."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.is_dir():
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def replace(whole: Path, folder: Path) -> None:
    """Rename ``whole`` to ``folder``; an existing folder is then found under ``whole``, or beside it as ``former``.

    On Linux the two names are exchanged atomically. Elsewhere the existing folder is moved away first, and a process
    that is killed in between leaves it as ``former`` in the hidden folder.
    """
    if folder.exists() and not _exchange(whole, folder):
        folder.rename(whole.with_name("former"))
    if whole.exists() and not folder.exists():
        whole.rename(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; return False if the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return int(rename(here, os.fsencode(one), here, os.fsencode(other), exchange)) == 0


def edit(file: Path, **values: Any) -> None:
    """Change values of a JSON file."""
    write(file, json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")


def write(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def save_tokenizer(path: str, folder: Path) -> str | None:
    """Save the tokenizer of a model, with its chat template; return the reason if that fails, or None."""
    from elsa_lightning.lm.text import load_tokenizer

    try:
        load_tokenizer(path).save_pretrained(folder)
    except Exception as error:  # a broken tokenizer must not lose the model
        return f"{path} has no tokenizer to save beside the model: {type(error).__name__}: {error}"
    for name in ("tokenizer.model", "spiece.model"):  # transformers reads but does not save these
        if (Path(path) / name).is_file() and not (folder / name).exists():
            shutil.copyfile(Path(path) / name, folder / name)
    return None


def zeros_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (zeros, entries) of each matrix in a folder's safetensors files, with one in memory at a time."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if len(tensors.get_slice(name).get_shape()) > 1:
                    found[name] = count(tensors.get_tensor(name))
    return found


def zeros_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Return (zeros, entries) of each matrix in a state dict."""
    return {name: count(t) for name, t in state.items() if t.dim() > 1}


def count(t: torch.Tensor) -> tuple[int, int]:
    """Return (zeros, entries) of a tensor."""
    return t.numel() - int(torch.count_nonzero(t)), t.numel()

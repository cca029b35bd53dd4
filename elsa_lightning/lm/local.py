"""Local text: finds files, assigns them to splits by their names, and reads their rows."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from elsa_lightning.errors import UserError

Split = Literal["train", "validation", "test"]
Row = dict[str, Any]

KINDS = ".txt, .md, .json, .jsonl or .parquet (.txt, .json and .jsonl also as .gz, .json and .jsonl as .zst)"
_LOADERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_PACKED = {".gz": ("text", "json"), ".zst": ("json",)}
_SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip


def loader(path: Path) -> str | None:
    """Return the loader of ``datasets`` for a file, ``saved`` for a dataset of ``save_to_disk``, or None."""
    if path.is_dir():
        return "saved" if (path / "state.json").is_file() and (path / "dataset_info.json").is_file() else None
    packed = _PACKED.get(path.suffix)
    found = _LOADERS.get((path.with_suffix("") if packed else path).suffix)
    return found if packed is None or found in packed else None


def find(path: Path) -> list[Path]:
    """Return the readable files of a file or folder, in order; a saved dataset counts as one."""
    if loader(path) is not None:
        return [path]
    if not path.is_dir():
        return []
    found = sorted(p for p in path.rglob("*") if loader(p) is not None and not _hidden(p, path))
    if saved := [p for p in found if loader(p) == "saved"]:
        return saved
    documents = [p for p in found if p.name.lower() != "readme.md"]  # a readme describes data; alone it is the data
    return documents or found


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def split_of(path: Path, root: Path) -> Split | None:
    """Return the split after which a folder or a file is named, such as ``val/a.txt`` or ``x.test.jsonl``, or None."""
    *folders, name = path.relative_to(root).parts if path != root else [""]
    if path.is_dir():
        folders, name = [*folders, name], ""
    for folder in folders:
        if folder.lower() in _SPLITS:
            return _SPLITS[folder.lower()]
    dotted = name.lower().split(".")
    words = re.split(r"[-_ ]", dotted[0])
    return next((_SPLITS[word] for word in (*dotted, words[0], words[-1]) if word in _SPLITS), None)


def by_split(path: Path) -> dict[Split | None, list[Path]]:
    """Return the files by the split in their names, or all under None if no name has a split.

    Files without a split in their name are for training, unless other files are named so; then they are left out.
    """
    files = find(path)
    parts: dict[Split | None, list[Path]] = {}
    for file in files:
        parts.setdefault(split_of(file, path), []).append(file)
    if not parts.keys() & {"validation", "test"}:
        return {None: files}
    if "train" not in parts and None in parts:
        parts["train"] = parts.pop(None)
    return parts


def rows(files: list[Path]) -> Iterator[Row]:
    """Yield the rows of files of one kind.

    Raises:
        UserError: A file cannot be read, or the files are empty.
    """
    try:
        read = chain.from_iterable(_read(files))
        start = next(read)
    except (Exception, StopIteration) as error:  # each format's reader has its own exceptions
        reason = " ".join(str(error.__cause__ or error).split()) or "there is nothing in it"
        broken = files[0] if len(files) == 1 else next((file for file in files if not _is_readable(file)), files[0])
        raise UserError(
            f"{str(broken)!r} is no readable {broken.suffix}: {reason.rstrip('.')}. Of .txt and .md UTF-8 is read, of "
            f".json and .jsonl an object a line, of .parquet a table"
        ) from error
    return chain([start], read)


def _is_readable(file: Path) -> bool:
    try:
        next(iter(chain.from_iterable(_read([file]))))
    except (Exception, StopIteration):
        return False
    return True


def _read(files: list[Path]) -> list[Iterable[Row]]:
    import datasets

    kind = loader(files[0])
    if kind == "saved":
        return [datasets.load_from_disk(str(file)) for file in files]
    if any(file.suffix == ".zst" for file in files):
        return [_lines(file) for file in files]
    options = {"sample_by": "document"} if kind == "text" else {}
    return [datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)]


def _lines(file: Path) -> Iterator[Row]:
    """Yield the objects of JSON lines, compressed or not; ``datasets`` would need one more library for ``.zst``."""
    import pyarrow

    with pyarrow.input_stream(str(file), compression="detect") as stream:
        for number, line in enumerate(io.TextIOWrapper(stream, "utf-8"), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{str(file)!r}: line {number} is no JSON: {error}") from error
            yield row

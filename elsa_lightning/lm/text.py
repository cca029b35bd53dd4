"""Where text comes from, and the cached stream of tokens made of it."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm.auto import tqdm

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.lm import pydocs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]

_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_HELD_OUT = 0.05  # of a local text, for validation and again for test
_C4_DOCUMENTS, _C4_SEGMENTS = 1100, 256  # the published C4 evaluation
_DOCUMENTS_A_BATCH = 500


@dataclass(frozen=True)
class Source:
    """A named text: ``pydocs``, ``c4``, ``wikitext2``, or a file or folder.

    Args:
        name: One of the names above, or a path.
        streaming: Download C4 document by document rather than a whole shard.

    Raises:
        ValueError: ``name`` is none of these.
    """

    name: str
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.name in ("pydocs", "c4", "wikitext2"):
            return
        if not self.path.exists():
            raise UserError(
                f"data.name {self.name!r} is not 'pydocs', 'c4' or 'wikitext2', and no file or folder of that "
                f"name exists; give one of these names or an existing path"
            )
        files = self.files()
        if not files:
            raise UserError(f"data.name {self.name!r} holds no file that ends in {', '.join(_LOADERS)}")
        if len({_LOADERS[file.suffix] for file in files}) > 1:
            raise UserError(
                f"data.name {self.name!r} mixes file types; give a folder with one of {', '.join(_LOADERS)}"
            )

    @property
    def path(self) -> Path:
        """The file or folder, for a local text."""
        return Path(self.name).expanduser()

    @property
    def is_local(self) -> bool:
        """Whether the text is a file or folder of the user's."""
        return self.name not in ("pydocs", "c4", "wikitext2")

    def files(self) -> list[Path]:
        """Return the readable files of a local text, in order."""
        if self.path.is_file():
            return [self.path] if self.path.suffix in _LOADERS else []
        return sorted(file for file in self.path.rglob("*") if file.suffix in _LOADERS and file.is_file())

    def identity(self) -> list[Any]:
        """Return what the text depends on: if this is the same, so is the text."""
        if self.name == "pydocs":
            return ["pydocs", pydocs.VERSION, sys.version]
        if self.is_local:
            stats = [(str(file.resolve()), file.stat()) for file in self.files()]
            return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return [self.name]

    def documents(self, split: Split) -> Iterable[str]:
        """Return the documents of a split; a local text has all of them in ``train``.

        WikiText-2 and C4 have one published evaluation text each, WikiText-2's test and C4's validation
        split: both ``validation`` and ``test`` mean that one.

        Raises:
            OSError: A download failed.
            ValueError: The files cannot be read, or have no ``text`` column.
        """
        if self.name == "pydocs":
            return pydocs.documents(split)
        import datasets

        if self.is_local:
            files = [str(file) for file in self.files()]
            loader = _LOADERS[self.files()[0].suffix]
            options = {"sample_by": "document"} if loader == "text" else {}
            try:
                table = datasets.load_dataset(loader, data_files=files, split="train", **options)
            except (Exception, StopIteration) as error:  # of the reader of each format
                reason = str(error.__cause__ or error) or "there is nothing in it"
                raise UserError(
                    f"{self.name!r} is no readable {self.files()[0].suffix}: {reason.rstrip('.')}. Of a .txt file "
                    f"UTF-8 is read, of .jsonl an object a line, of .parquet a table, both with 'text'"
                ) from error
            if "text" not in table.column_names:
                raise UserError(f"{self.name!r} has the columns {table.column_names}, and needs one named 'text'")
            return (row["text"] for row in table)
        hub: dict[str, dict[str, Any]] = {
            "c4": {"path": "allenai/c4", "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz"}},
            "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
        }  # fmt: skip
        held_out = "validation" if self.name == "c4" else "test"
        try:
            rows = datasets.load_dataset(
                **hub[self.name], split="train" if split == "train" else held_out, streaming=self.streaming
            )
            return (row["text"] for row in rows)
        except Exception as error:  # the hub's clients raise many unrelated types
            raise UnavailableError(
                f"downloading {hub[self.name]['path']} ({self.name}) failed: {type(error).__name__}: {error}\n"
                f"Without a network use --data.name pydocs (comes with Python) or --data.name PATH, a file or folder "
                f"of .txt, .jsonl or .parquet; or download once elsewhere and set HF_HOME to that cache."
            ) from error

    def evaluation_text(self, split: Split) -> str:
        """Return the held-out documents joined as the literature joins them."""
        documents = self.documents(split)
        if self.name == "c4":
            return " ".join(islice(documents, _C4_DOCUMENTS))
        return "\n\n".join(documents)


def token_stream(
    source: Source,
    split: Split,
    tokenizer_path: str,
    *,
    seq_len: int,
    limit: int | None = None,
    cache_dir: Path | None = None,
) -> np.ndarray:
    """Return a split as one stream of tokens, from the cache or made now.

    Training documents follow each other, each ended by the tokenizer's EOS token. Held-out text is joined
    and tokenized as one. Of a local text the stream's last parts are held out.

    Args:
        source: The text.
        split: Which part.
        tokenizer_path: Folder or hub name of the tokenizer.
        seq_len: Tokens a sequence; the published C4 evaluation takes 256 of these.
        limit: Tokens needed; None for all.
        cache_dir: Where token files go; None puts them beside the cache of ``datasets``.

    Returns:
        int32 ``(tokens,)``, memory-mapped.
    """
    tokenizer = _tokenizer(tokenizer_path)
    whole = source.is_local or (split == "train" and not source.is_local)
    if split != "train" and source.name == "c4":
        limit = min(limit or _C4_SEGMENTS * seq_len, _C4_SEGMENTS * seq_len)
    needed = limit if split == "train" and not source.is_local else None
    part: Split = "train" if source.is_local else split
    file = _cache_folder(cache_dir) / f"{_fingerprint(source, part, tokenizer, needed)}.npy"
    if not file.exists():
        if whole:
            tokens = _training_tokens(source, tokenizer, needed)
        else:
            tokens = np.asarray(tokenizer(source.evaluation_text(split), verbose=False)["input_ids"], dtype=np.int32)
        _write(file, tokens)
    stream: np.ndarray = np.load(file, mmap_mode="r")
    if source.is_local:
        held = int(len(stream) * _HELD_OUT)
        bounds = {"train": (0, -2 * held), "validation": (-2 * held, -held), "test": (-held, len(stream))}
        start, end = bounds[split]
        stream = stream[start:end] if held else stream[: len(stream) if split == "train" else 0]
    return stream[:limit]


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        knows_text = bool(tokenizer("a text", add_special_tokens=False)["input_ids"])
    except ValueError:
        knows_text = False
    if not knows_text:  # for some models transformers makes an empty one up, where there is none
        raise UserError(f"{path!r} has no tokenizer that knows any text: save the model's into its folder too")
    return tokenizer


def _training_tokens(source: Source, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> np.ndarray:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    parts: list[np.ndarray] = []
    count = 0
    with tqdm(desc=f"tokenizing {source.name}", unit=" tokens", unit_scale=True, total=needed, leave=False) as bar:
        for texts in _batches(source.documents("train")):
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                parts.append(np.asarray(ids + end, dtype=np.int32))
                count += len(ids) + len(end)
            bar.update(count - bar.n)
            if needed is not None and count >= needed:
                break
    return np.concatenate(parts)[:needed] if parts else np.zeros(0, dtype=np.int32)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while texts := list(islice(iterator, _DOCUMENTS_A_BATCH)):
        yield texts


def _cache_folder(cache_dir: Path | None) -> Path:
    if cache_dir is None:
        import datasets

        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "elsa_lightning"
    cache_dir.mkdir(parents=True, exist_ok=True)
    return cache_dir


def _fingerprint(source: Source, split: Split, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    key = [source.identity(), split, needed, hashlib.sha256(vocabulary.encode()).hexdigest(), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _write(file: Path, tokens: np.ndarray) -> None:
    """Write under a temporary name and rename: a reader never sees half a file."""
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
        np.save(temporary, tokens)
    Path(temporary.name).replace(file)

"""The sources of text, built-in or local, and the cached stream of tokens made from each."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.lm import local, pydocs
from elsa_lightning.lm.chat import column_of, encode
from elsa_lightning.lm.local import Row, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELD_OUT = 0.05  # fraction of a local text held out for validation, and the same again for test
_C4_DOCUMENTS, _C4_SEGMENTS = 1100, 256  # the published C4 evaluation
_DOCUMENTS_A_BATCH = 500
_VERSION = 3  # increased when streams are made differently, so that older caches are not used
_NAMES = ("pydocs", "c4", "wikitext2")


@dataclass(frozen=True)
class Source:
    """A named text: ``pydocs``, ``c4``, ``wikitext2``, or a file or folder.

    Args:
        name: One of the names above, or a path.
        streaming: Download C4 document by document rather than a whole shard.
        text_column: Column of a local text; None finds ``text``, ``messages``, or ``prompt`` and ``completion``.
        hold_out: Whether the last tenth of a local text without splits of its own is excluded from training.
        without: Files of a local text that are not read.
        argument: The argument that named it, for error messages.

    Raises:
        UserError: ``name`` is neither a known name nor a path.
    """

    name: str
    streaming: bool = False
    text_column: str | None = None
    hold_out: bool = True
    without: frozenset[Path] = frozenset()
    argument: str = field(default="data.name", compare=False)

    def __post_init__(self) -> None:
        if not self.is_local:
            return
        if not self.path.exists():
            raise UserError(
                f"{self.argument} {self.name!r} is not 'pydocs', 'c4' or 'wikitext2', and no file or folder of that "
                f"name exists; give one of these names or an existing path"
            )
        if not local.find(self.path):
            raise UserError(f"{self.argument} {self.name!r} holds no file that ends in {local.KINDS}")
        for part in self.parts.values():
            if len({local.loader(file) for file in part}) > 1:
                raise UserError(
                    f"{self.argument} {self.name!r} mixes file types; give a folder with one of {local.KINDS}"
                )

    @property
    def path(self) -> Path:
        """The file or folder, for a local text."""
        return Path(self.name).expanduser()

    @property
    def is_local(self) -> bool:
        """Whether the text is a file or folder of the user's."""
        return self.name not in _NAMES

    @cached_property
    def parts(self) -> dict[Split | None, list[Path]]:
        """The files of each split of a local text, all under None if no name has a split."""
        found = local.by_split(self.path) if self.is_local else {}
        kept = {split: [f for f in part if f.resolve() not in self.without] for split, part in found.items()}
        return {split: part for split, part in kept.items() if part}

    def part(self, split: Split) -> list[Path]:
        """Return the files of a split of a local text; if only one of validation and test exists, it serves as both.

        Raises:
            UserError: There are no such files.
        """
        if not self.is_local:
            return []
        if None in self.parts and len(self.parts) == 1:
            return self.parts[None]
        other: Split = "validation" if split == "test" else "test"
        part = self.parts.get(split) or (self.parts.get(other) if split != "train" else None)
        if part is None:
            named = f"what it holds is named {', '.join(map(str, self.parts))}"
            reason = named if self.parts else "all of it is what data.eval_name evaluates on"
            raise UserError(f"{self.argument} {self.name!r} has no {split} text, {reason}: give another, or more files")
        return part

    def summary(self) -> str:
        """Describe the files of each split of a local text, and those that are left out."""
        unused = self.parts.get(None, []) if len(self.parts) > 1 else []
        shown = {split or "of no split, left out": part for split, part in self.parts.items() if split or unused}
        return f"{self.name}: " + ", ".join(f"{len(p)} files {s} ({p[0].name} …)" for s, p in shown.items())

    @property
    def is_cut(self) -> bool:
        """Whether the last tenth of the stream is held out for evaluation."""
        return self.is_local and self.hold_out and self.parts.keys() == {None}

    def identity(self, split: Split) -> list[Any]:
        """Return everything on which a split's text depends, as a key of the cache."""
        if self.name == "pydocs":
            return ["pydocs", pydocs.VERSION, sys.version, split]
        if self.is_local:
            read = [f for file in self.part(split) for f in ([file] if file.is_file() else sorted(file.iterdir()))]
            stats = [(str(file.resolve()), file.stat()) for file in read]
            return [self.text_column, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
        return [self.name, split]

    def documents(self, split: Split) -> Iterable[str]:
        """Return the documents of a split of a text that is not local.

        WikiText-2 and C4 have one published evaluation text each, WikiText-2's test split and C4's validation
        split; ``validation`` and ``test`` both return it.

        Raises:
            UnavailableError: A download failed.
        """
        if self.name == "pydocs":
            return pydocs.documents(split)
        import datasets

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
        except Exception as error:  # hub clients raise many unrelated types
            raise UnavailableError(
                f"downloading {hub[self.name]['path']} ({self.name}) failed: {type(error).__name__}: {error}\n"
                f"Without a network use --data.name pydocs (comes with Python) or --data.name PATH, a file or folder "
                f"of text; or download once elsewhere and set HF_HOME to that cache."
            ) from error

    def evaluation_text(self, split: Split) -> str:
        """Return the held-out documents, joined as in the literature."""
        documents = self.documents(split)
        if self.name == "c4":
            return " ".join(islice(documents, _C4_DOCUMENTS))
        return "\n\n".join(documents)


def token_stream(
    source: Source,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | str,
    *,
    seq_len: int,
    limit: int | None = None,
    cache_dir: Path | None = None,
) -> np.ndarray:
    """Return a split as one stream of tokens, from the cache if possible.

    Documents follow each other, each ended by the tokenizer's EOS token. Held-out text that is not local is joined
    and tokenized as one, as in the literature. If a local text has no splits of its own, the last parts of its stream
    are held out, unless other text for evaluation was named.

    Args:
        source: The text.
        split: The split.
        tokenizer: The tokenizer, or its folder or hub name.
        seq_len: Tokens in a sequence; the published C4 evaluation takes 256 sequences.
        limit: Number of tokens needed; None for all. A local text is always returned whole.
        cache_dir: Folder for token files; None puts them beside the cache of ``datasets``.

    Returns:
        int32 ``(tokens,)``, memory-mapped; int64 if some tokens are only context, stored as ``~id``.
    """
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    if split != "train" and source.name == "c4":
        limit = min(limit or _C4_SEGMENTS * seq_len, _C4_SEGMENTS * seq_len)
    needed = limit if split == "train" and not source.is_local else None
    file = _cache_folder(cache_dir) / f"{_fingerprint(source, split, tokenizer, needed)}.npy"
    if not file.exists():
        if source.is_local or split == "train":
            tokens = _document_tokens(source, split, tokenizer, needed)
        else:
            tokens = np.asarray(tokenizer(source.evaluation_text(split), verbose=False)["input_ids"], dtype=np.int32)
        _write(file, tokens)
    stream: np.ndarray = np.load(file, mmap_mode="r")
    if source.is_cut:
        held = int(len(stream) * _HELD_OUT)
        bounds = {"train": (0, -2 * held), "validation": (-2 * held, -held), "test": (-held, len(stream))}
        start, end = bounds[split]
        stream = stream[start:end] if held else stream[: len(stream) if split == "train" else 0]
    return stream if source.is_local else stream[:limit]


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub name.

    Raises:
        UnavailableError: There is no tokenizer, or only an empty one.
    """
    from transformers import AutoTokenizer

    reason = ""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        if tokenizer("a text", add_special_tokens=False)["input_ids"]:
            return tokenizer
    except (ValueError, OSError) as error:
        reason = f" ({error})"
    # for some models without a tokenizer, transformers makes up an empty one
    raise UnavailableError(
        f"{path!r} has no tokenizer that knows any text: save the model's into its folder too (in "
        f"Python, CalibrationData takes another){reason}"
    )


def _document_tokens(
    source: Source, split: Split, tokenizer: PreTrainedTokenizerBase, needed: int | None
) -> np.ndarray:
    rows: Iterable[Row]
    if source.is_local:
        read = local.rows(source.part(split))
        rows = chain([first := next(read)], read)
        column = column_of(first, source.text_column, source.name)
    else:
        rows, column = ({"text": document} for document in source.documents(split)), "text"
    parts: list[np.ndarray] = []
    count = 0
    with tqdm(desc=f"tokenizing {source.name}", unit=" tokens", unit_scale=True, total=needed, leave=False) as bar:
        for encoded in encode(rows, column, tokenizer, source.name, _DOCUMENTS_A_BATCH):
            parts += encoded
            count += sum(map(len, encoded))
            bar.update(count - bar.n)
            if needed is not None and count >= needed:
                break
    return np.concatenate(parts)[:needed] if parts else np.zeros(0, dtype=np.int32)


def _cache_folder(cache_dir: Path | None) -> Path:
    if cache_dir is None:
        import datasets

        cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / "elsa_lightning"
    cache_dir.mkdir(parents=True, exist_ok=True)
    return cache_dir


def _fingerprint(source: Source, split: Split, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    key = [_VERSION, source.identity(split), needed, hashlib.sha256(vocabulary.encode()).hexdigest(),
           tokenizer.eos_token_id, str(tokenizer.chat_template) if source.is_local else None]  # fmt: skip
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def _write(file: Path, tokens: np.ndarray) -> None:
    """Write under a temporary name and rename, so that readers never see an incomplete file."""
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
        np.save(temporary, tokens)
    Path(temporary.name).replace(file)

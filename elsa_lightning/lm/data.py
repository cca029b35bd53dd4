"""Calibration and evaluation text as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from elsa_lightning.errors import UserError
from elsa_lightning.lm import EMBEDDED_MODEL, model_path
from elsa_lightning.lm.text import Source, Split, token_stream


class PackedTokens(Dataset[Tensor]):
    """A stream of tokens cut into sequences of equal length; the tail that fills none is dropped.

    Args:
        tokens: Token ids ``(n,)``, may be memory-mapped.
        seq_len: Tokens a sequence.
        bos: Token put at the start of every sequence, taking one of its places; None for none.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, bos: int | None = None) -> None:
        self.tokens, self.seq_len, self.bos = tokens, seq_len, bos
        self.stride = seq_len - (bos is not None)

    def __len__(self) -> int:
        return len(self.tokens) // self.stride

    def __getitem__(self, index: int) -> Tensor:
        """Return sequence ``index``: int64 ``(seq_len,)``."""
        start = index * self.stride
        ids = torch.from_numpy(self.tokens[start : start + self.stride].astype(np.int64))
        return ids if self.bos is None else torch.cat([torch.tensor([self.bos]), ids])


class EvaluationShare(Dataset[dict[str, Tensor]]):
    """Every ``world``-th sequence from ``rank`` on, for as many steps on every process; none is scored twice.

    Where the sequences run out early one more is given whose labels say that nothing is to be scored.
    """

    def __init__(self, data: PackedTokens, world: int, rank: int) -> None:
        self.data, self.world, self.rank = data, world, rank

    def __len__(self) -> int:
        return -(-len(self.data) // self.world)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return token ids and labels of a sequence: int64 ``(seq_len,)``."""
        place = index * self.world + self.rank
        ids = self.data[min(place, len(self.data) - 1)]
        return {"input_ids": ids, "labels": ids if place < len(self.data) else torch.full_like(ids, -100)}


class ResumableSampler(DistributedSampler[Tensor]):
    """A seeded shuffle per epoch that can leave out the samples an interrupted epoch already gave."""

    skip = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)


class ResumableLoader(DataLoader[Tensor]):
    """A DataLoader whose state is its place in the epoch; Lightning saves and restores it.

    Batches are counted as they are handed out, so workers that read ahead do not disturb the count.
    """

    _given = 0
    _skip = 0

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of this epoch were handed out."""
        return {"batches": self._given % len(self)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Make the next epoch start after the batches that ``state_dict`` counts."""
        self._skip = state_dict["batches"]

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        self._given, self._skip = self._skip, 0
        assert self.batch_size is not None
        if self.generator is None:  # a DataLoader draws a seed for its workers, which would disturb the model's dropout
            self.generator = torch.Generator()
        self.sampler.skip = self._given * self.batch_size  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self._given += 1
            yield batch


class CalibrationData(LightningDataModule):
    """Text, tokenized once, cached, and packed to sequences of ``seq_len`` tokens.

    Training batches are shuffled by ``seed``; a resumed run goes on at the very next sample. Evaluation joins
    the held-out documents, cuts non-overlapping segments and drops the tail, as the literature does. Batches
    are token ids ``(batch_size, seq_len)``, int64.

    Args:
        name: ``pydocs`` (text that comes with Python, no network), ``c4`` (first shard of ``allenai/c4``),
            ``wikitext2``, or a file or folder of ``.txt``, ``.jsonl`` or ``.parquet`` with a ``text`` column.
            Of local text the last 10 % is held out, half for validation and half for test.
        eval_name: Text that perplexity is measured on, like ``name``; None takes the held-out part of ``name``.
        tokenizer: Hub name or folder; the command line fills in the model's.
        seq_len: Tokens a sequence.
        batch_size: Sequences a batch, on each device.
        eval_batch_size: Sequences an evaluation batch; None takes ``batch_size``.
        train_sequences: Use only as many sequences as this; None uses all there are.
        eval_segments: Measure only on as many segments as this; None measures on all.
        bos_per_segment: Start every sequence with the BOS token; None does it for Gemma, which needs it.
        streaming: Download only the documents needed for ``train_sequences``, not the whole shard.
        seed: Order of the training sequences.
        num_workers: Processes that load batches.
        cache_dir: Where token files go; None puts them beside the cache of ``datasets``.
    """

    def __init__(
        self,
        name: str = "pydocs",
        eval_name: str | None = None,
        tokenizer: str = EMBEDDED_MODEL,
        seq_len: int = 256,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        train_sequences: int | None = None,
        eval_segments: int | None = None,
        bos_per_segment: bool | None = None,
        streaming: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        for argument, value, least in (
            ("seq_len", seq_len, 2),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("train_sequences", train_sequences, 1),
            ("eval_segments", eval_segments, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"{argument} must be {least} or more, got {value}")
        if streaming and train_sequences is None:
            raise UserError("streaming needs train_sequences: how many sequences to download text for")
        self.source = Source(name, streaming)
        self.eval_source = self.source if eval_name is None else Source(eval_name, streaming)
        self.tokenizer = model_path(tokenizer)
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.train_sequences = train_sequences
        self.eval_segments = eval_segments
        self.bos_per_segment = bos_per_segment
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._sets: dict[Split, PackedTokens] = {}
        self._loader: ResumableLoader | None = None
        self._resume: dict[str, int] = {"batches": 0}

    def prepare_data(self) -> None:
        """Download and tokenize what is not cached yet, in one process a machine."""
        for split in ("train", "validation"):
            self._tokens(split)

    def setup(self, stage: str) -> None:
        """Open the token files of the splits that ``stage`` needs."""
        splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "validation"), "validate": ("validation",)}
        for split in splits.get(stage, ("test",)):
            self._sets[split] = self._packed(split)

    def _tokens(self, split: Split) -> np.ndarray:
        source = self.source if split == "train" else self.eval_source
        sequences = self.train_sequences if split == "train" else self.eval_segments
        return token_stream(
            source,
            split,
            self.tokenizer,
            seq_len=self.seq_len,
            limit=None if sequences is None else sequences * self.seq_len,
            cache_dir=self.cache_dir,
        )

    def _packed(self, split: Split) -> PackedTokens:
        from transformers import AutoTokenizer

        tokens = self._tokens(split)
        source = self.source if split == "train" else self.eval_source
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        every = self.bos_per_segment
        if every is None:
            every = "gemma" in type(tokenizer).__name__.lower() or "gemma" in self.tokenizer.lower()
        if every and tokenizer.bos_token_id is None:
            raise UserError(f"bos_per_segment: tokenizer {self.tokenizer!r} has no BOS token; set it to false")
        if split != "train" and self.eval_segments is not None:  # with BOS as many tokens give more segments
            tokens = tokens[: self.eval_segments * (self.seq_len - every)]
        packed = PackedTokens(tokens, self.seq_len, tokenizer.bos_token_id if every else None)
        needed = self.batch_size if split == "train" else 1
        if len(packed) < needed:
            raise UserError(
                f"the {split} text of {source.name!r} has {len(tokens)} tokens, {len(packed)} sequences of "
                f"{self.seq_len}, and {needed} are needed; give more text, or a smaller seq_len or batch_size"
            )
        return packed

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches ``(batch_size, seq_len)``; a batch that would not be full is dropped."""
        data = self._sets["train"]
        world, rank = self._world()
        sampler = ResumableSampler(data, num_replicas=world, rank=rank, shuffle=True, seed=self.seed, drop_last=True)
        self._loader = ResumableLoader(
            data, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers, drop_last=True
        )
        # Lightning restores loaders too, but not when a module asked for the number of steps before
        self._loader.load_state_dict(self._resume)
        self._resume = {"batches": 0}
        return self._loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation segments in order; several processes share them."""
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test segments in order; several processes share them."""
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test segments in order."""
        return DataLoader(self._sets["test"], batch_size=self.eval_batch_size, num_workers=self.num_workers)

    def _in_order(self, split: Split) -> DataLoader[Any]:
        data = self._sets[split]
        world, rank = self._world()
        if world == 1:
            return DataLoader(data, batch_size=self.eval_batch_size, num_workers=self.num_workers)
        share = EvaluationShare(data, world, rank)
        sampler: Any = DistributedSampler(share, num_replicas=1, rank=0, shuffle=False)  # Lightning leaves it alone
        return DataLoader(share, batch_size=self.eval_batch_size, num_workers=self.num_workers, sampler=sampler)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def protocol(self) -> str:
        """Say what perplexity was measured on: text, segments, length and BOS policy."""
        split: Split = "validation" if "validation" in self._sets else "test"
        data = self._sets[split]
        bos = ", BOS at each segment" if data.bos is not None else ""
        return f"{self.eval_source.name} {split}, {len(data)} segments of {self.seq_len} tokens{bos}"

    def _settings(self) -> dict[str, Any]:
        return {"data.name": self.source.name, "data.seq_len": self.seq_len, "data.batch_size": self.batch_size,
                "data.seed": self.seed, "data.train_sequences": self.train_sequences}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the epoch, and the settings that it is only meaningful with."""
        return {**self._settings(), "loader": self._resume if self._loader is None else self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the checkpoint's place in the data.

        Raises:
            ValueError: A setting differs.
        """
        for setting, ours in self._settings().items():
            theirs = state_dict.get(setting, ours)
            if theirs != ours:
                raise UserError(
                    f"the checkpoint was made with {setting}={theirs!r}, this run has {ours!r}: it cannot go on at "
                    f"the next sample. Resume with the same setting, or start anew without ckpt_path"
                )
        self._resume = state_dict["loader"]

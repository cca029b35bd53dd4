"""CalibrationData: text for training and for measuring perplexity, as a LightningDataModule."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

from elsa_lightning.errors import UserError
from elsa_lightning.lm import EMBEDDED_MODEL, model_path
from elsa_lightning.lm.local import Split
from elsa_lightning.lm.packing import EvaluationShare, PackedTokens, ResumableLoader, ResumableSampler
from elsa_lightning.lm.text import Source, load_tokenizer, token_stream

_SPLITS: dict[str, tuple[Split, ...]] = {"fit": ("train", "validation"), "validate": ("validation",)}


class CalibrationData(LightningDataModule):
    """Text, tokenized once, cached, and packed into sequences of ``seq_len`` tokens.

    Training batches are shuffled by ``seed``; a resumed run continues with the very next sample. Evaluation joins the
    held-out documents, cuts non-overlapping segments and drops the tail, as is usual in the literature. Batches are
    token ids ``(batch_size, seq_len)``, int64; for conversations, and prompts with completions, a dict of ``input_ids``
    and ``labels``, which are -100 where the token is not the assistant's or the completion's.

    Args:
        name: ``pydocs`` (text that comes with Python, no network), ``c4`` (first shard of ``allenai/c4``),
            ``wikitext2``, or a file or folder of text: ``.txt``, ``.md``, ``.jsonl``, ``.json``, ``.parquet``, some of
            them compressed, or a dataset written by ``save_to_disk`` of ``datasets``. Files and folders named train,
            validation (valid, val, dev, eval) or test are these splits. Without such names the last 10 % is held out,
            half for validation and half for test, unless ``eval_name`` is given.
        eval_name: Text for measuring perplexity, given like ``name``: all of it, or its own validation and test splits;
            None takes the held-out part of ``name``.
        text_column: Column of the files' rows that holds strings, or lists of messages, which the tokenizer's chat
            template renders; None takes whichever exists of ``text``, ``messages``, and ``prompt`` with ``completion``.
        tokenizer: Hub name or folder; the command line fills in the model's.
        seq_len: Tokens a sequence.
        batch_size: Sequences in a batch, on each device.
        eval_batch_size: Sequences in an evaluation batch; None takes ``batch_size``.
        train_sequences: Use at most so many sequences; None uses all.
        eval_segments: Measure on at most so many segments; None measures on all.
        bos_per_segment: Start every sequence with the BOS token; None does so for Gemma, which needs it.
        streaming: Download only the documents needed for ``train_sequences``, not the whole shard.
        seed: Seed of the order of training sequences.
        num_workers: Processes that load batches.
        cache_dir: Folder for token files; None puts them beside the cache of ``datasets``.
    """

    def __init__(
        self,
        name: str = "pydocs",
        eval_name: str | None = None,
        text_column: str | None = None,
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
        self.source = self.eval_source = Source(name, streaming, text_column)
        if eval_name is not None and Path(eval_name).expanduser().resolve() != self.source.path.resolve():
            self.eval_source = Source(
                eval_name, streaming, text_column, hold_out=False, argument="data.eval_name"
            )  # fmt: skip
            evaluated = [*self.eval_source.part("validation"), *self.eval_source.part("test")]
            without = frozenset(file.resolve() for file in evaluated)
            self.source = replace(self.source, hold_out=False, without=without)
        self.source.part("train")
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
        """Download and tokenize what is not cached yet, in one process on each machine."""
        stage = "fit" if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value
        for split in self._splits(stage):
            self._tokens(split)

    def _splits(self, stage: str) -> list[Split]:
        unused = self.trainer is not None and stage == "fit" and self.trainer.limit_val_batches == 0
        return [split for split in _SPLITS.get(stage, ("test",)) if not (unused and split == "validation")]

    def setup(self, stage: str) -> None:
        """Open the token files of the splits that ``stage`` needs."""
        for split in self._splits(stage):
            self._sets[split] = self._packed(split)
        for source in {self.source, self.eval_source}:
            if stage == "fit" and source.parts.keys() - {None}:
                (rank_zero_warn if None in source.parts else rank_zero_info)(source.summary())

    @property
    def largest_token(self) -> int:
        """The largest token id in the open token files; computing it reads them all."""
        return max((int(np.maximum(s.tokens, ~s.tokens).max()) for s in self._sets.values()), default=0)

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
        tokens = self._tokens(split)
        source = self.source if split == "train" else self.eval_source
        tokenizer = load_tokenizer(self.tokenizer)
        every = self.bos_per_segment
        if every is None:
            every = "gemma" in type(tokenizer).__name__.lower() or "gemma" in self.tokenizer.lower()
        if every and tokenizer.bos_token_id is None:
            raise UserError(f"bos_per_segment: tokenizer {self.tokenizer!r} has no BOS token; set it to false")
        most = self.train_sequences if split == "train" else self.eval_segments
        packed = PackedTokens(tokens, self.seq_len, tokenizer.bos_token_id if every else None, most)
        needed = self.batch_size if split == "train" else 1
        if len(packed) < needed:
            scored = " in which something is scored" if packed.has_context else ""
            raise UserError(
                f"the {split} text of {source.name!r} has {len(tokens)} tokens, {len(packed)} sequences of "
                f"{self.seq_len}{scored}, and {needed} are needed; give more text, or a smaller seq_len or batch_size"
            )
        return packed

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches ``(batch_size, seq_len)``; an incomplete batch is dropped."""
        data = self._sets["train"]
        world, rank = self._world()
        sampler = ResumableSampler(data, num_replicas=world, rank=rank, shuffle=True, seed=self.seed, drop_last=True)
        self._loader = ResumableLoader(
            data, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers, drop_last=True
        )
        self._loader.limit = self._batches_an_epoch
        # Lightning restores loaders too, but not if a module asked for the number of steps before
        self._loader.load_state_dict(self._resume)
        self._resume = {"batches": 0}
        return self._loader

    def _batches_an_epoch(self) -> float:
        """Return how many batches Lightning takes, which it knows only after it was given the loader."""
        return math.inf if self.trainer is None else self.trainer.num_training_batches

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
        sampler: Any = DistributedSampler(share, num_replicas=1, rank=0, shuffle=False)  # so Lightning adds none
        return DataLoader(share, batch_size=self.eval_batch_size, num_workers=self.num_workers, sampler=sampler)

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def protocol(self) -> str:
        """Describe on what perplexity was measured: text, segments, length and BOS policy."""
        split: Split = "validation" if "validation" in self._sets else "test"
        data = self._sets[split]
        bos = ", BOS at each segment" if data.bos is not None else ""
        scored = ", what is answered alone" if data.has_context else ""
        return f"{self.eval_source.name} {split}, {len(data)} segments of {self.seq_len} tokens{bos}{scored}"

    def evaluation(self) -> dict[str, Any]:
        """Return the arguments that, with the tokenizer, reproduce the validation segments."""
        theirs = None if self.eval_source.name == self.source.name else self.eval_source.name
        arguments = {
            "name": self.source.name,
            "eval_name": theirs,
            "text_column": self.source.text_column,
            "seq_len": self.seq_len,
            "eval_segments": self.eval_segments,
            "bos_per_segment": self._sets["validation"].bos is not None,
        }
        return arguments | ({"streaming": True, "train_sequences": 1} if self.source.streaming else {})

    def _settings(self) -> dict[str, Any]:
        return {
            "data.name": self.source.name,
            "data.text_column": self.source.text_column,
            "the last tenth held out": self.source.is_cut,
            "data.seq_len": self.seq_len,
            "data.batch_size × processes": self.batch_size * self._world()[0],  # what the position is counted in
            "data.seed": self.seed,
            "data.train_sequences": self.train_sequences,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch, and the settings for which it is valid."""
        return {
            **self._settings(),
            "loader": self._resume if self._loader is None else self._used(self._loader).state_dict(),
        }

    def _used(self, loader: ResumableLoader) -> ResumableLoader:
        """Return what batches are taken of: ``overfit_batches`` puts another loader in the place of ours."""
        used = None if self.trainer is None else self.trainer.train_dataloader
        return used if isinstance(used, ResumableLoader) else loader

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the checkpoint's position in the data, if training continues.

        Raises:
            UserError: A setting differs from the checkpoint's.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        for setting, ours in self._settings().items():
            theirs = state_dict.get(setting, ours)
            if theirs != ours:
                raise UserError(
                    f"the checkpoint was made with {setting}={theirs!r}, this run has {ours!r}: it cannot go on at "
                    f"the next sample. Resume with the same setting, or start anew without ckpt_path"
                )
        self._resume = state_dict["loader"]

"""Perplexity by the published protocol: the text is joined, and cut into segments that do not overlap."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tqdm.auto import tqdm

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.evaluation.compare import Score, mean_error
from elsa_lightning.evaluation.tasks import unmoved
from elsa_lightning.lm.chat import column_of
from elsa_lightning.lm.local import rows
from elsa_lightning.lm.packing import PackedTokens
from elsa_lightning.lm.perplexity import TokenPerplexity
from elsa_lightning.lm.text import Source, token_stream
from elsa_lightning.optim.moments import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "segment", "stream", "none"]
_USUAL_LENGTH = 2048  # segment length of the published tables


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    seq_len: int | None = None,
    segments: int | None = None,
    bos: Bos = "auto",
) -> Score:
    """Return the perplexity of a model on a text, with its standard error over segments.

    The documents are joined (WikiText-2 and files with two newlines, the first 1,100 of C4 with a blank), tokenized
    once, cut into segments of ``seq_len`` tokens, and the tail is dropped. Each token but a segment's first is scored.

    Args:
        model: A causal language model of transformers, on its device.
        tokenizer: The model's tokenizer.
        text: ``wikitext2`` (its test text), ``c4`` (256 segments of its validation text), ``pydocs``, or a file or
            folder of text: its test files (else its validation files) if names tell which these are, else all of it.
        seq_len: Tokens in a segment; None takes 2048, or as many as the model can take.
        segments: Use only so many segments, the first ones; None uses all.
        bos: Where BOS goes. ``stream``: once, where the tokenizer puts it before the whole text, as published.
            ``segment``: at the start of every segment. ``none``: nowhere. ``auto``: ``segment`` for Gemma, which needs
            it, else ``stream``.

    Raises:
        UserError: An argument is out of range, or the text is shorter than a segment.
        UnavailableError: A text is not available.
    """
    if bos not in get_args(Bos):
        raise UserError(f"bos must be one of {get_args(Bos)}, got {bos!r}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(_USUAL_LENGTH, longest or _USUAL_LENGTH) if seq_len is None else seq_len
    if length < 2 or (longest is not None and length > longest):
        raise UserError(f"seq_len must be from 2 to the {longest} tokens that the model can take, got {length}")
    if segments is not None and segments < 1:
        raise UserError(f"segments must be 1 or more, got {segments}")
    if bos == "auto":
        bos = "segment" if "gemma" in type(tokenizer).__name__.lower() + tokenizer.name_or_path.lower() else "stream"
    if bos == "segment" and tokenizer.bos_token_id is None:
        raise UserError("bos 'segment' needs a tokenizer with a BOS token, and this one has none: give stream")
    try:
        tokens = _tokens(text, tokenizer, length, bos)
    except UserError as error:  # its message names options of a run's data
        told = str(error).replace("--data.name", "--perplexity").replace("data.name ", "text ")
        if isinstance(error, UnavailableError):
            raise UnavailableError(told) from error
        raise UserError(told) from error
    packed = PackedTokens(tokens, length, tokenizer.bos_token_id if bos == "segment" else None, segments)
    if len(packed) == 0:
        raise UserError(f"{text!r} has {len(tokens)} tokens, not one segment of {length}: give a smaller seq_len")
    split = "" if text not in ("wikitext2", "c4", "pydocs") else " validation" if text == "c4" else " test"
    put = {"segment": "BOS at each segment", "none": "no BOS", "stream": "no BOS"}[bos]
    if bos == "stream" and len(tokens) and int(tokens[0]) == tokenizer.bos_token_id:
        put = "BOS once, at the beginning"
    protocol = f"{text}{split}, {len(packed)} segments of {length} tokens, {put}, {dtype_name(model.dtype)}"
    with unmoved(model):
        losses = _losses(model, packed, text)
    mean = math.fsum(losses.values()) / len(losses)
    value = math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN
    spread = mean_error(list(losses.values()))
    parts: dict[Hashable, float] = {}
    if math.isfinite(value):
        parts = {segment: value * loss for segment, loss in losses.items()}
    return Score(text, "perplexity", value, None if spread is None else value * spread, len(losses), parts, protocol)


@torch.inference_mode()
def _losses(model: Any, packed: PackedTokens, text: str) -> dict[Hashable, float]:
    """Return each segment's mean negative log-likelihood, in nats, by its index and a digest of its tokens."""
    metric = TokenPerplexity().to(model.device)
    losses: dict[Hashable, float] = {}
    for place in tqdm(range(len(packed)), f"perplexity on {text}", leave=False, mininterval=0.5):
        item = packed[place]
        assert isinstance(item, torch.Tensor)
        ids = item[None].to(model.device)
        metric.reset()
        metric.update(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:])
        digest = hashlib.sha256(item.numpy().tobytes()).hexdigest()  # differs with another tokenizer
        losses[place, digest] = float((metric.total_log_probs / metric.count).cpu())
    return losses


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase, length: int, bos: Bos) -> np.ndarray:
    source = Source(text, hold_out=False, argument="text")
    plain = bos != "stream"
    if not source.is_local and not plain and tokenizer.is_fast:  # the cache cannot tell how a slow one puts BOS
        return token_stream(source, "test", tokenizer, seq_len=length)
    joined = _local_text(source) if source.is_local else source.evaluation_text("test")
    ids = tokenizer(joined, add_special_tokens=not plain, verbose=False)["input_ids"]
    most = 256 * length if text == "c4" else None
    return np.asarray(ids[:most], dtype=np.int32)


def _local_text(source: Source) -> str:
    """Return the documents of a local text, joined.

    Rows whose text is null are left out, as they are in training. Completions are refused: without their prompts, which
    are only context, they would be measured as something that the model never has to predict.
    """
    read = list(rows(source.part("test")))
    column = column_of(read[0], source.text_column, source.name)
    documents = [value for row in read if (value := row.get(column)) is not None]
    if column == "completion" or not all(isinstance(document, str) for document in documents):
        raise UserError(f"{source.name!r} holds conversations, which elsa test measures; perplexity here is of text")
    if left_out := len(read) - len(documents):
        rank_zero_warn(f"{left_out} of the {len(read)} rows of {source.name!r} have no {column!r} (null), left out")
    if not any(documents):
        raise UserError(f"the text {source.name!r} is empty: none of its {len(read)} rows has any {column!r}")
    return "\n\n".join(documents)

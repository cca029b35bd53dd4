"""Checks by their configurations whether :class:`~elsa_lightning.CausalLM` supports a model and its data."""

from __future__ import annotations

from typing import Any

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.lm.data import CalibrationData
from elsa_lightning.lm.text import load_tokenizer


def decoder_config(path: str, name: str, **source: Any) -> Any:
    """Return a model's configuration; refuse models that do not predict the next token from those before it.

    Args:
        path: Path or hub name of the model.
        name: The model's name, for messages.
        source: Further arguments of ``AutoConfig.from_pretrained``.

    Raises:
        UserError: The model is an encoder–decoder, reads images or sound, is trained on masked tokens, or is unknown.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    try:
        config: Any = AutoConfig.from_pretrained(path, **source)
    except ValueError as error:  # an architecture unknown to transformers, or untrusted code
        raise UserError(f"model {name!r} could not be loaded: {error}") from error
    of_its_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    kind = None
    if config.is_encoder_decoder:
        kind = "an encoder–decoder"
    elif config.get_text_config() is not config:
        kind = "a model of text with images or sound"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        kind = "a masked language model, which sees the tokens it would predict"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not of_its_own:
        kind = "no language model"
    if kind is not None:
        raise UserError(
            f"model {name!r} ({config.model_type}) is {kind}: CausalLM and elsa fit take decoders that predict the "
            f"next token, such as Llama, Qwen, Gemma, OPT or GPT-2; prune others with ElsaCallback in your own module"
        )
    return config


def check_tokens(config: Any, data: Any, name: str) -> None:
    """Refuse data with tokens outside the model's vocabulary, which would cause an index error on the device.

    Args:
        config: The model's configuration.
        data: A data module, or a Trainer that has one; only CalibrationData is checked. Tokens that were added to a
            tokenizer are searched for in the text, as soon as that is available.
        name: The model's name, for messages.

    Raises:
        UserError: The model's vocabulary is too small.
    """
    data = getattr(data, "datamodule", data)
    if not isinstance(data, CalibrationData):
        return
    try:
        tokenizer = load_tokenizer(data.tokenizer)
    except UnavailableError:  # the data module reports this; planning memory works without a tokenizer
        return
    size = config.get_text_config().vocab_size
    largest = tokenizer.vocab_size - 1
    if largest < size < len(tokenizer):
        largest = data.largest_token
    if largest >= size:
        raise UserError(
            f"the tokenizer {data.tokenizer!r} has token {largest}, and model {name!r} knows {size}: save the "
            f"model's own tokenizer into its folder, or resize its embeddings (resize_token_embeddings)"
        )

"""Tokenizes rows of text, conversations, or prompts with completions, and marks which tokens are scored.

A token that is only context, such as the user's words, is stored as ``~id``, which is negative.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from elsa_lightning.errors import UserError
from elsa_lightning.lm.local import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\b")


def column_of(columns: Iterable[str], text_column: str | None, name: str) -> str:
    """Return the column that holds the text: ``text_column``, or the first known one that exists.

    Raises:
        UserError: There is no such column.
    """
    columns = list(columns)
    if text_column is None and {"prompt", "completion"} <= {*columns} and not {"text", "messages"} & {*columns}:
        return "completion"
    known = ["text", "messages"] if text_column is None else [text_column]
    found = next((column for column in known if column in columns), None)
    if found is None:
        wanted = "'text', 'messages', or 'prompt' and 'completion'" if text_column is None else repr(text_column)
        raise UserError(f"{name!r} has the columns {columns}, and needs {wanted}: set data.text_column")
    return found


def encode(
    rows: Iterable[Row], column: str, tokenizer: PreTrainedTokenizerBase, name: str, batch: int
) -> Iterator[list[np.ndarray]]:
    """Yield the tokens of the rows, ``batch`` rows at a time: int32, or int64 with ``~id`` for context.

    The tokenizer's EOS token ends plain text and completions; the template ends conversations. Rows without text are
    skipped, with a warning.

    Args:
        rows: The rows of one text.
        column: The column with strings, with lists of messages, or ``completion``, whose context is ``prompt``.
        tokenizer: The tokenizer; conversations need its chat template.
        name: Name of the text, for messages.
        batch: Rows in a batch.

    Raises:
        UserError: The column holds something other than text, or a conversation cannot be rendered.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    empty = count = 0
    iterator = iter(rows)
    while some := list(islice(iterator, batch)):
        texts, encoded = [], []
        for row in some:
            count += 1
            value = row.get(column)
            if not value:
                empty += value is None
            elif isinstance(value, str) and column != "completion":
                texts.append(value)
            elif _are_messages(value):
                prompt = row.get("prompt") if column == "completion" else None
                encoded.append(
                    _conversation(value, tokenizer, prompt, _tools(row.get("tools"), f"{name!r}: row {count}"))
                )
            elif isinstance(value, str) and isinstance(prompt := row.get("prompt") or "", str):
                marked = _marked(tokenizer, prompt + value, [(len(prompt), len(prompt + value))])
                encoded.append(np.concatenate([marked, np.asarray(end, dtype=np.int64)]))
            else:
                raise UserError(f"{name!r}: row {count} holds {str(value)[:80]!r} as {column!r}, which is no text")
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        yield [np.asarray(one + end, dtype=np.int32) for one in ids] + encoded
    if empty:
        rank_zero_warn(f"{empty} of the {count} rows of {name!r} have no {column!r} (null) and are left out")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)


def _without_nulls(value: Any) -> Any:
    """Return a value without the nulls in its objects.

    Arrow gives all objects of a column the same keys, so an object has nulls for the keys of others, such as the
    arguments of other tools, which a template would render.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _messages(messages: list[Any]) -> list[Any]:
    """Return messages without nulls, but with a role and content, which templates take for granted."""
    kept = ("role", "content")
    return [{k: _without_nulls(v) for k, v in message.items() if v is not None or k in kept} for message in messages]


def _tools(value: Any, row: str) -> list[Any] | None:
    """Return the tools of a row, a list or JSON of one, as templates take them; None if there are none."""
    tools = value
    if isinstance(value, str) and value.strip():
        with suppress(ValueError):  # what is no JSON is refused below
            tools = json.loads(value)
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{row} holds {str(value)[:80]!r} as 'tools', which must be a list of objects, or JSON of one")
    return list(_without_nulls(tools))


def _conversation(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, prompt: list[Any] | None, tools: list[Any] | None
) -> np.ndarray:
    """Return a conversation's tokens; scored are the assistant's, or all that follow ``prompt`` if there is one."""
    messages = _messages(messages)
    if prompt is not None:
        if not _are_messages(prompt):
            raise UserError(f"a completion of messages needs a prompt of messages, got {str(prompt)[:80]!r}")
        prompt = _messages(prompt)
        whole = _render(tokenizer, [*prompt, *messages], tools=tools)
        before = _render(tokenizer, prompt, True, tools=tools)
        return _marked(tokenizer, whole, [_range(tokenizer, whole, before, whole)])
    if _GENERATION.search(str(tokenizer.chat_template)):  # the template marks what is the assistant's
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        out: Any = _render(tokenizer, messages, tools=tools, **options)
        ids = np.asarray(out["input_ids"], dtype=np.int64)
        return np.where(np.asarray(out["assistant_masks"]) == 1, ids, ~ids)
    whole = _render(tokenizer, messages, tools=tools)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    parts = [
        (_before(tokenizer, messages, i, tools), _render(tokenizer, messages[: i + 1], tools=tools)) for i in answers
    ]
    return _marked(tokenizer, whole, [_range(tokenizer, whole, before, after) for before, after in parts])


def _before(tokenizer: PreTrainedTokenizerBase, messages: list[Any], place: int, tools: list[Any] | None) -> str:
    """Return the text rendered before the answer at ``place``, with the answer's header.

    Before a first message there are none, which cannot be rendered: if the assistant begins, its
    header is what a template puts after the message where an answer is to follow.
    """
    if place > 0:
        return str(_render(tokenizer, messages[:place], True, tools=tools))
    one = str(_render(tokenizer, messages[:1], tools=tools))
    head = str(_render(tokenizer, messages[:1], True, tools=tools))[len(one) :]
    return one[: one.find(head) + len(head)] if head in one else ""


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Any], answer_follows: bool = False, **options: Any
) -> Any:
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which conversations need: take the "
            f"model's instruction-tuned version, put a template into its folder, or give text"
        )
    try:
        options = {"tokenize": False, **options}
        return tokenizer.apply_chat_template(messages, add_generation_prompt=answer_follows, **options)
    except Exception as error:  # templates may raise anything
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} cannot render {str(messages)[:200]}: {error}; messages "
            f"are a list of objects with 'role' and 'content'"
        ) from error


def _range(tokenizer: PreTrainedTokenizerBase, whole: str, before: str, after: str) -> tuple[int, int]:
    """Return begin and end of an answer in the text ``whole``, given the texts rendered before and up to the answer."""
    if not (whole.startswith(after) and after.startswith(before)):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} renders a message differently when others follow, so "
            f"what the assistant says cannot be told apart: mark it in the template with {{% generation %}}"
        )
    return len(before), len(after)


def _marked(tokenizer: PreTrainedTokenizerBase, text: str, scored: list[tuple[int, int]]) -> np.ndarray:
    """Return the tokens of a text: ``id`` for those that overlap a scored range of characters, ``~id`` for others.

    A token may begin before its range: after a prompt that ends in a blank, the answer's first token is often the blank
    together with a word.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} does not say which characters its tokens are, as messages and "
            f"completions need; give a fast one (tokenizer.json), or text instead"
        )
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    chosen = np.zeros(len(ids), dtype=bool)
    for start, end in scored:
        chosen |= (start < ends) & (starts < end) & (starts < ends)
    return np.where(chosen, ids, ~ids)

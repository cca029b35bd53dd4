"""Runs tasks of lm-eval on a loaded model."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from elsa_lightning.commands import nearest
from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.evaluation.compare import Score
from elsa_lightning.layout.precise import evaluating
from elsa_lightning.optim.moments import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PUBLISHED = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
_USUAL = ("acc", "acc_norm")


def check_lm_eval() -> None:
    """Raise UserError if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "tasks need lm-eval, which is not installed: pip install 'lm-eval[hf]>=0.4.9'; perplexity "
            "(--perplexity wikitext2) needs nothing more"
        )


def zero_shot(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = PUBLISHED,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    batch_size: int = 8,
) -> list[Score]:
    """Return the scores of tasks: ``acc`` and ``acc_norm``, or all metrics of a task that has neither.

    Random states are preserved.

    Args:
        model: A causal language model of transformers, on its device.
        tokenizer: The model's tokenizer.
        tasks: Names of tasks or groups that lm-eval knows.
        include_path: Folder of your own task files (YAML); they take precedence over lm-eval's.
        limit: Evaluate at most so many items of each task, the first ones; None takes all.
        num_fewshot: Examples before each question.
        batch_size: Sequences in a batch.

    Raises:
        UserError: lm-eval is not installed or does not know a task, or an argument is out of range.
        UnavailableError: The data of a task is not available.
    """
    check_lm_eval()
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} must be {least} or more, got {value}")
    if not tasks:
        raise UserError(f"give at least one task, such as {PUBLISHED[0]}")
    with unmoved(model), _counting() as cut:
        results, longest = _evaluate(model, tokenizer, tasks, include_path, batch_size, num_fewshot, limit)
    how = f"lm-eval {_version()}, {num_fewshot} examples, {dtype_name(model.dtype)}"
    how += "" if limit is None else f", the first {limit} items"
    if cut.times:
        how += f", inputs that were cut on the left to the model's {longest} tokens: {cut.times}"
    return [score for name in results["samples"] for score in _scores(name, results, how)]


def _evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include_path: str | Path | None,
    batch_size: int,
    num_fewshot: int,
    limit: int | None,
) -> tuple[dict[str, Any], int]:
    """Return the results of lm-eval, and the largest number of tokens that the model can take."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, loaded = _loaded(tasks, include_path)
    manager.load = lambda _: loaded  # else the data would be loaded again
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(
        wrapped, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit, bootstrap_iters=1000,
        random_seed=None, numpy_random_seed=None, torch_random_seed=None,
    )  # fmt: skip
    return results, wrapped.max_length


@contextmanager
def unmoved(model: Any) -> Iterator[None]:
    """Put the model into evaluation mode, and restore its modes and all random states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with evaluating(model):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _Cut(logging.Filter):
    """Counts lm-eval's warnings about truncated inputs, one for each, and suppresses all warnings."""

    times = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        self.times += "exceeds model's maximum length" in record.getMessage()
        return record.levelno > logging.WARNING


@contextmanager
def _counting() -> Iterator[_Cut]:
    everything, ours = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface")
    former, counter = (everything.level, ours.level), _Cut()
    everything.setLevel(logging.ERROR)
    ours.setLevel(logging.WARNING)
    ours.addFilter(counter)
    try:
        yield counter
    finally:
        ours.removeFilter(counter)
        everything.setLevel(former[0])
        ours.setLevel(former[1])


def check_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Raise the errors of :func:`zero_shot` that need no model, by loading the tasks and their data."""
    check_lm_eval()
    with _counting():
        _loaded(tasks, include_path)


def _loaded(tasks: Sequence[str], include_path: str | Path | None) -> tuple[Any, Any]:
    manager = _manager(tasks, include_path)
    try:
        return manager, manager.load(list(tasks))
    except Exception as error:  # datasets, hub clients and task files raise many types
        raise UnavailableError(
            f"the tasks {', '.join(tasks)} could not be loaded: {type(error).__name__}: {error}\nWithout a network "
            f"give --include-path FOLDER with task files whose data is local (docs/evaluation.md)"
        ) from error


def _manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Return a task manager: for the user's own files if these have all tasks, else also for lm-eval's."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        folder = Path(include_path).expanduser()
        if not folder.is_dir():
            raise UnavailableError(f"include_path {str(include_path)!r} is no folder; give one with task files (YAML)")
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    manager = TaskManager(include_path=None if include_path is None else str(folder))
    for task in tasks:
        if not manager.match_tasks([task]):
            near = nearest(task, manager.all_tasks)
            raise UserError(f"lm-eval knows no task {task!r}" + (f"; did you mean {near}?" if near else ""))
    return manager


def _scores(task: str, results: dict[str, Any], how: str) -> list[Score]:
    found: dict[str, Any] = results["results"][task]
    known = {key.partition(",")[0]: key for key in found if isinstance(found[key], (int, float))}
    figures = {name: key for name, key in known.items() if "," in key and not name.endswith("_stderr")}
    chosen = {name: key for name, key in figures.items() if name in _USUAL} or figures
    items = results["samples"][task]
    version = results["versions"].get(task)
    protocol = how + (f", task version {version}" if version is not None else "")
    scores = []
    for name, key in chosen.items():
        value = float(found[key])
        error = found.get(key.replace(name, f"{name}_stderr", 1))
        error = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None
        parts = _parts(items, name, key.partition(",")[2], value)
        scores.append(Score(task, name, value, error, results["n-samples"][task]["effective"], parts, protocol))
    return scores


def _parts(items: Sequence[dict[str, Any]], metric: str, filter_: str, value: float) -> dict[Hashable, float]:
    """Return the contribution of each item, or an empty dict if the figure is not their mean."""
    mine = [item for item in items if item.get("filter", filter_) == filter_]
    if not all(isinstance(item.get(metric), (int, float)) for item in mine):
        return {}
    parts: dict[Hashable, float] = {
        (item["doc_id"], item.get("doc_hash"), item.get("prompt_hash")): float(item[metric]) for item in mine
    }
    mean = math.fsum(parts.values()) / max(1, len(parts))
    return parts if len(parts) == len(mine) and math.isclose(mean, value, abs_tol=1e-9) else {}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lm_eval")
    except PackageNotFoundError:
        return "of unknown version"

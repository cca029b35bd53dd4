"""The command ``elsa evaluate``: its parser and entry point."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elsa_lightning.commands import CommandParser
from elsa_lightning.errors import UnavailableError, UserError

if TYPE_CHECKING:
    from elsa_lightning.evaluation.compare import Score

_USUAL_TEXT = "wikitext2"


def parser() -> CommandParser:
    """Return the parser; making it imports neither torch nor transformers."""
    made = CommandParser(
        "elsa evaluate",
        description="Measure a model, beside the dense one that it was made of. Without --tasks and --perplexity: the "
        "published seven tasks, without examples, and WikiText-2.",
    )
    add = made.add_argument
    add("model", help="a model folder, an export, a run's folder, a .ckpt, or a name on the hub")
    add("--against", metavar="MODEL", help="the dense model (default: the one the model was made of, if it is at hand)")
    add("--tasks", metavar="A,B", help="tasks of lm-eval, or 'published' for the seven; 'none' for none")
    add(
        "--include-path",
        "--include_path",
        metavar="FOLDER",
        help="with task files of your own, of local data too",
    )
    add("--limit", type=int, metavar="N", help="the first N items of each task alone")
    add("--num-fewshot", "--num_fewshot", type=int, default=0, metavar="N", help="examples (default: %(default)s)")
    add("--perplexity", metavar="A,B", help="texts: wikitext2, c4, pydocs, or files or folders; 'none' for none")
    add("--seq-len", "--seq_len", type=int, metavar="N", help="tokens a segment (default: 2048, or the model's most)")
    add("--segments", type=int, metavar="N", help="the first N segments of each text alone")
    add(
        "--bos", choices=("auto", "stream", "segment", "none"), default="auto",
        help="where BOS goes: once before the text if the tokenizer does it (stream), at each segment, nowhere; auto "
        "is segment for Gemma, else stream",
    )  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are saved)")
    add("--device", help="such as cuda:0 or cpu (default: an accelerator if there is one)")
    add("--batch-size", "--batch_size", type=int, default=8, metavar="N", help="of tasks (default: %(default)s)")
    add("--base", metavar="NAME", help="the model that a checkpoint is of, where the checkpoint does not say so")
    add("--output", metavar="FILE", help="JSON of all figures, to write")
    return made


def main(arguments: Sequence[str]) -> None:
    """Evaluate a model.

    Args:
        arguments: The arguments after ``evaluate``.
    """
    given = parser().parse_args(arguments)
    output = None if given.output is None else Path(given.output).expanduser()
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output {given.output!r} must be a file in a folder that exists")
    from elsa_lightning.evaluation.tasks import PUBLISHED, check_lm_eval

    usual = given.tasks is None and given.perplexity is None
    named = "published" if usual else given.tasks
    tasks = list(PUBLISHED) if named == "published" else _list(named)
    texts = _list(_USUAL_TEXT if usual else given.perplexity)
    if not tasks and not texts:
        raise UserError("nothing is to be measured: give --tasks or --perplexity")
    if tasks:
        check_lm_eval()
    from elsa_lightning.evaluation.compare import table, to_dict
    from elsa_lightning.evaluation.models import Loaded, load
    from elsa_lightning.export.record import command, versions
    from elsa_lightning.lm import model_path
    from elsa_lightning.lm.text import Source

    def measured(model: Loaded) -> list[Score]:
        return _measure(model, tasks, texts, given)

    for text in texts:  # raises before hours of work if a text does not exist
        Source(text, hold_out=False, argument="--perplexity").part("test")
    try:
        model_path(given.against or "")
    except UnavailableError as error:
        raise UserError(
            f"--against {given.against!r} does not exist: give a folder, a checkpoint or a name on the hub"
        ) from error
    sparse = load(given.model, given.base, given.dtype, given.device)
    dense_name = given.against or sparse.base_at_hand
    found = measured(sparse)
    name, dtype, known = sparse.name, sparse.dtype, sparse.base
    del sparse  # one model at a time in memory
    dense, failed = [], None
    try:
        dense = [] if dense_name is None else measured(load(dense_name, None, given.dtype or dtype, given.device))
    except Exception as error:  # must not lose what was measured
        failed = error
    print(f"{name}" + (f" beside {dense_name}" if dense else ""))
    print(table(found, dense))
    if dense_name is None:
        print("no dense model to compare with: give --against NAME" + (f", such as {known}" if known else ""))
    if output is not None:
        report = {
            "model": name, "dense": dense_name, "dtype": dtype, "figures": to_dict(found, dense), "command": command(),
            "versions": versions(),
        }  # fmt: skip
        write_json(output, report)
        print(f"written: {output}")
    if failed is not None:
        raise failed


def write_json(file: Path, report: dict[str, Any]) -> None:
    """Write figures to a file, atomically; null stands for those that are not finite, which JSON does not have."""
    from elsa_lightning.export.folders import write
    from elsa_lightning.report import finite

    write(file, json.dumps(finite(report), indent=2, allow_nan=False) + "\n")


def _list(given: str | None) -> list[str]:
    return [] if given in (None, "none") else [part for part in str(given).split(",") if part]


def _measure(model: Any, tasks: list[str], texts: list[str], given: Any) -> list[Score]:
    from elsa_lightning.evaluation.tasks import zero_shot
    from elsa_lightning.evaluation.text import perplexity

    found = [
        perplexity(model.model, model.tokenizer, text, seq_len=given.seq_len, segments=given.segments, bos=given.bos)
        for text in texts
    ]
    if tasks:
        found += zero_shot(
            model.model, model.tokenizer, tasks, include_path=given.include_path, limit=given.limit,
            num_fewshot=given.num_fewshot, batch_size=given.batch_size,
        )  # fmt: skip
    return found

"""The command ``elsa export``: its parser and entry point."""

from __future__ import annotations

from collections.abc import Sequence

from elsa_lightning.commands import CommandParser

_TO = ("hf", "shrunk", "quantized", "cpu-sparse", "gguf")


def parser() -> CommandParser:
    """Return the parser; making it imports neither torch nor transformers."""
    made = CommandParser(
        "elsa export",
        description="Write a sparse model for somewhere else, and check that what was written is that model.",
    )
    add = made.add_argument
    add("--from", dest="source", required=True, metavar="PATH", help="a model folder, a run's folder, or a .ckpt")
    add("--to", required=True, choices=_TO, help="see docs/exports.md")
    add("--output", required=True, metavar="FOLDER", help="to write; a model that is there is replaced at the end")
    add("--model", metavar="NAME", help="the model that a checkpoint is of, where the checkpoint does not say so")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they were given)")
    add("--bits", type=int, choices=(4, 8), help="of quantized (default: of the grid it was trained on, else 4)")
    add(
        "--group-size", "--group_size", type=int, metavar="N",
        help="of quantized: weights that share a scale; 0 for a row (default: of the grid it was trained on, else 128)",
    )  # fmt: skip
    add(
        "--break-even", "--break_even", type=float, metavar="SHARE",
        help="of cpu-sparse: zeros from which on a layer is kept as sparse rows (default: 0.6)",
    )  # fmt: skip
    add("--gguf-type", "--gguf_type", default="f16", metavar="TYPE", help="of gguf: f32, f16, bf16, q8_0 or q4_0")
    add("--converter", metavar="PATH", help="of gguf: llama.cpp's convert_hf_to_gguf.py, if it is no command")
    add("--measure", action="store_true", help="measure perplexity, as the run did, and speed beside the dense model")
    add("--archive", action="store_true", help="write OUTPUT.tar.zst too, for transport")
    return made


def main(arguments: Sequence[str]) -> None:
    """Export a model.

    Args:
        arguments: The arguments after ``export``.
    """
    given = parser().parse_args(arguments)
    from elsa_lightning.export.cpu_sparse import BREAK_EVEN
    from elsa_lightning.export.formats import Options
    from elsa_lightning.export.write import export

    even = BREAK_EVEN if given.break_even is None else given.break_even
    options = Options(given.bits, given.group_size, even, given.gguf_type, given.converter)
    export(
        given.source,
        given.to,
        given.output,
        model=given.model,
        dtype=given.dtype,
        options=options,
        measure=given.measure,
        archive=given.archive,
    )

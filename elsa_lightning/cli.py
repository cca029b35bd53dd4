"""The command line, ``elsa COMMAND``: dispatches to the command, and imports only what that one needs."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from elsa_lightning import __version__
from elsa_lightning.commands import CommandParser, nearest
from elsa_lightning.errors import for_users

OF_A_TRAINER = ("fit", "plan", "validate", "test", "predict")
HELP = """usage: elsa COMMAND [options]        (elsa COMMAND --help explains them)

Prunes language models while they train: sparsity is a constraint, met by ADMM.

commands that train or measure:
  fit        prune a model, and save it with exact zeros
  plan       the memory that fit would take; loads no weights
  validate   perplexity on the validation text
  test       perplexity on the test text
  predict    the loss of each sequence of the test text, in a file

commands for a model that is saved:
  sparsity   where its zeros are
  evaluate   perplexity and zero-shot tasks, beside the dense model
  export     write it for elsewhere: smaller, quantized, for CPUs, as GGUF

commands for runs:
  sweep      fit at several sparsities and seeds, one after the other
  report     one page of what runs left, compared

examples:
  # the small model that comes along, to 90 % zeros; needs no network
  elsa fit --config configs/elsa.yaml
  # your model, your text, 70 %
  elsa fit --config configs/elsa.yaml --elsa.sparsity 0.7 \\
      --model.name path/to/model --data.name path/to/texts
  # does it fit into 80 GiB?
  elsa plan --config configs/elsa_l.yaml --gpu-memory 80 \\
      --model.name path/to/model
  # where a run left its zeros, and a form of it that is faster on CPUs
  elsa sparsity runs/elsa/lightning_logs/version_0/hf
  elsa export --from runs/elsa/lightning_logs/version_0 --to cpu-sparse \\
      --output exports/cpu
  # the price of sparsity, as a curve
  elsa sweep --config configs/elsa.yaml --sparsity 0.5,0.7,0.9
  elsa report runs/elsa --output report.html

options:
  -h, --help   show this
  --version    show the version
"""


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    A user's mistake ends it with a one-line message; ``JSONARGPARSE_DEBUG=1`` in the environment shows the traceback.

    Args:
        args: Arguments without the program's name; None takes ``sys.argv``.
    """
    arguments = [_shipped(argument) for argument in (sys.argv[1:] if args is None else args)]
    if args is None:  # LightningCLI reads sys.argv
        sys.argv[1:] = arguments
    try:
        _run(arguments, from_shell=args is None)
    except Exception as error:
        explanation = for_users(error)
        if explanation is None or os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        print(f"elsa: error: {explanation}", file=sys.stderr)
        raise SystemExit(1) from error


def command() -> None:
    """Run the command ``elsa``: :func:`main`, and the end of the process.

    A run over several processes that came to its end leaves without the interpreter's own: threads of torch outlive
    that, and std::terminate makes a failure of it now and then.
    """
    leaves = False

    def leave() -> None:
        if leaves:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    atexit.register(leave)  # before all others, and so called after them
    main()
    processes = sys.modules.get("torch.distributed")
    leaves = processes is not None and processes.is_available() and processes.is_initialized()


def _run(arguments: list[str], from_shell: bool) -> None:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(HELP, end="")
        raise SystemExit(0)
    if first == "--version":
        print(f"elsa {__version__}")
        raise SystemExit(0)
    if first in WITHOUT_TRAINER:
        return WITHOUT_TRAINER[first](arguments[1:])
    if not first.startswith("-") and first not in OF_A_TRAINER:
        known = {*WITHOUT_TRAINER, *OF_A_TRAINER}
        near = nearest(first, known)
        meant = f"; did you mean {near}?" if near else f"; there are {', '.join(sorted(known))}"
        CommandParser("elsa").error(f"unknown command: {first}{meant}" if first else f"give a command{meant}")
    import_module("elsa_lightning.training").run(arguments, from_shell)
    return None


def _shipped(argument: str) -> str:
    """Replace ``configs/NAME.yaml`` by the packaged file, if the working folder has no such file."""
    value = argument.removeprefix("--config=")
    if not value.startswith(("configs/", "callbacks/")) or Path(value).exists():
        return argument.replace("--gpu-memory", "--gpu_memory", 1)
    package = Path(str(files("elsa_lightning")))
    places = (package / value, package / "configs" / value, package.parent / value)  # two in a wheel, one in a checkout
    found = next((str(place) for place in places if place.is_file()), value)
    return argument.replace(value, found)


def _evaluate(arguments: Sequence[str]) -> None:
    import_module("elsa_lightning.evaluation.command").main(arguments)


def _export(arguments: Sequence[str]) -> None:
    import_module("elsa_lightning.export.command").main(arguments)


def _report(arguments: Sequence[str]) -> None:
    import_module("elsa_lightning.reports.command").main(arguments)


def _sweep(arguments: Sequence[str]) -> None:
    import_module("elsa_lightning.sweep").main(arguments)


def _sparsity(arguments: Sequence[str]) -> None:
    parser = CommandParser(
        "elsa sparsity", description="Where the zeros of a saved model are; nothing is loaded whole."
    )
    parser.add_argument(
        "path", help="a model's or a run's folder, a .safetensors file or its index, .gguf, or what torch saved"
    )
    parser.add_argument("--json", action="store_true", help="print all of it for machines")
    options = parser.parse_args(arguments)
    found = import_module("elsa_lightning.inspection").sparsity(options.path)
    print(json.dumps(found.to_dict(), indent=1) if options.json else found)


# each takes the arguments after its name, and imports heavy packages only after parsing them
WITHOUT_TRAINER: dict[str, Callable[[Sequence[str]], None]] = {
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
    "sparsity": _sparsity,
    "sweep": _sweep,
}

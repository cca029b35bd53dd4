"""The command line: ``elsa fit | validate | test | predict``."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from elsa_lightning.lm.data import CalibrationData
from elsa_lightning.lm.module import CausalLM


class ElsaCLI(LightningCLI):
    """LightningCLI for a :class:`CausalLM` on :class:`CalibrationData`; the tokenizer follows the model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the data's tokenizer to the model's name."""
        parser.link_arguments("model.name", "data.tokenizer")


def _shipped(argument: str) -> str:
    """Return ``configs/NAME.yaml`` as the packaged file where the working folder has none of that name."""
    value = argument.removeprefix("--config=")
    if not value.startswith("configs/") or Path(value).exists():
        return argument
    package = Path(str(files("elsa_lightning")))
    for folder in (package, package.parent):  # an installed wheel, a checkout
        if (folder / value).is_file():
            return argument.replace(value, str(folder / value))
    return argument


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments without the program's name; None takes ``sys.argv``.
    """
    ElsaCLI(
        CausalLM,
        CalibrationData,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "elsa", "description": "Prune Hugging Face language models with Elsa."},
        args=[_shipped(argument) for argument in (sys.argv[1:] if args is None else args)],
    )

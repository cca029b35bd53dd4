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
    if not value.startswith(("configs/", "callbacks/")) or Path(value).exists():
        return argument
    package = Path(str(files("elsa_lightning")))
    places = (package / value, package / "configs" / value, package.parent / value)  # a wheel's two, a checkout's
    found = next((str(place) for place in places if place.is_file()), value)
    return argument.replace(value, found)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments without the program's name; None takes ``sys.argv``.
    """
    if args is None:  # LightningCLI reads sys.argv, and warns of both
        sys.argv[1:] = [_shipped(argument) for argument in sys.argv[1:]]
    ElsaCLI(
        CausalLM,
        CalibrationData,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "elsa", "description": "Prune Hugging Face language models with Elsa."},
        auto_configure_optimizers=False,  # CausalLM's own optimizer and schedule are not to be bypassed
        args=None if args is None else [_shipped(argument) for argument in args],
    )

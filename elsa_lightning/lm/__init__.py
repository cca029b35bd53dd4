"""Language models and their text for Lightning: CausalLM, CalibrationData; transformers and datasets load on use."""

from importlib.resources import files
from pathlib import Path

from elsa_lightning.errors import UnavailableError

EMBEDDED_MODEL = "pydocs-2m"


def model_path(name: str) -> str:
    """Return the path or name by which ``transformers`` finds a model: the embedded model's folder, or ``name``.

    Args:
        name: A hub name, a path, or the name of the embedded model.

    Raises:
        FileNotFoundError: ``name`` is written as a path that does not exist.
    """
    if name == EMBEDDED_MODEL and not Path(name).exists():
        return str(files("elsa_lightning").joinpath("models", name))
    written_as_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if written_as_path and not Path(name).expanduser().exists():
        raise UnavailableError(
            f"model name {name!r} is a path that does not exist; give an existing folder, a hub name such as "
            f"'facebook/opt-125m', or {EMBEDDED_MODEL!r}, the embedded model"
        )
    return str(Path(name).expanduser()) if name.startswith("~") else name

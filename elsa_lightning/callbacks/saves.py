"""Tracks the checkpoints of a Trainer, so that those of the last step can be rewritten with exact zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer


class MethodHook:
    """Wraps methods of one object until :meth:`remove`."""

    def __init__(self, owner: Any, **methods: Callable[..., Any]) -> None:
        self._owner, self._names = owner, list(methods)
        for name, method in methods.items():
            setattr(owner, name, method)

    def remove(self) -> None:
        """Restore the object's own methods."""
        for name in self._names:
            self._owner.__dict__.pop(name, None)


class Saves:
    """Remembers step and path of each checkpoint of a run, whichever callback saved it.

    Args:
        trainer: The run's Trainer.
        is_dense: Called after a save; returns whether the weights had no exact zeros.
    """

    def __init__(self, trainer: Trainer, is_dense: Callable[[], bool]) -> None:
        self._trainer, self._is_dense, self._save = trainer, is_dense, trainer.save_checkpoint
        self._made: dict[str, tuple[int, bool, tuple[Any, ...], dict[str, Any]]] = {}
        self._hook = MethodHook(trainer, save_checkpoint=self._saving)

    def _saving(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        self._save(filepath, *args, **kwargs)
        self._made[str(filepath)] = (self._trainer.global_step, self._is_dense(), args, kwargs)

    def is_latest_there(self) -> bool:
        """Return whether there is a checkpoint of the current step."""
        return any(step == self._trainer.global_step for step, *_ in self._made.values())

    def renew(self) -> None:
        """Rewrite checkpoints of the current step that were saved before the zeros were exact."""
        for path, (step, dense, args, kwargs) in list(self._made.items()):
            if step == self._trainer.global_step and dense:
                self._saving(path, *args, **kwargs)

    def remove(self) -> None:
        """Stop tracking."""
        self._hook.remove()


class BeforeSaving:
    """A hook called before a module's state dict is taken; copies and pickles of the module lose it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self, *_: Any) -> None:
        """Call the function."""
        self._call()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        """Pickle as a hook that does nothing, without the run."""
        return _without_run, ()


def _without_run() -> BeforeSaving:
    return BeforeSaving(_nothing)


def _nothing() -> None: ...

"""Finds the weights of a model that are sparse already, for KeepMask and KeptZeros."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from elsa_lightning.adapters import has_adapter
from elsa_lightning.anatomy import examine
from elsa_lightning.errors import UserError
from elsa_lightning.report import some
from elsa_lightning.selection import ALL_LINEAR, Selection, count_zeros, select

MIN_SPARSITY = 0.05  # chance and rounding to few bits make fewer zeros
SHOWN = 6  # names in a message


@dataclass(frozen=True)
class Counted:
    """The zeros of one tensor.

    Attributes:
        name: Name of the tensor.
        zeros: Number of zeros.
        size: Number of entries.
        pattern: The tightest of the usual N:M patterns that the zeros form, such as ``2:4``, or None.
    """

    name: str
    zeros: int
    size: int
    pattern: str | None = None


@dataclass(frozen=True)
class Kept:
    """The tensors that are kept sparse and those that are not; ``str`` describes them.

    Attributes:
        kept: Tensors whose zeros are kept.
        left_alone: Tensors with too few zeros, which train without a mask.
    """

    kept: tuple[Counted, ...]
    left_alone: tuple[Counted, ...]

    def __str__(self) -> str:
        """Return a one-line description."""
        zeros, size = sum(t.zeros for t in self.kept), sum(t.size for t in self.kept)
        count = len(self.kept) + len(self.left_alone)
        line = (
            f"{len(self.kept)} of {count} tensors keep {zeros:,} zeros of {size:,} weights ({zeros / max(size, 1):.1%})"
        )
        patterns = [t.pattern for t in self.kept if t.pattern is not None]
        for pattern in sorted(set(patterns)):
            line += f"; {pattern} in {patterns.count(pattern)} of them"
        if empty := [t.name for t in self.kept if t.zeros == t.size]:
            line += f"; nothing but zeros, and so not trained: {some(empty, SHOWN)}"
        if self.left_alone:
            named = some([f"{t.name} ({t.zeros:,} zeros of {t.size:,})" for t in self.left_alone], SHOWN)
            line += f"; {len(self.left_alone)} left alone, with too few zeros: {named}"
        return line


def sparse_weights(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    *,
    trained: Any = None,
    min_sparsity: float = MIN_SPARSITY,
) -> Selection:
    """Choose the weights whose zeros may be kept.

    Args:
        model: Any module with sparse weights.
        targets: As in :func:`elsa_lightning.selection.select`. None takes what ``all-linear`` means, and every other
            matrix, such as an embedding, that has ``min_sparsity`` zeros.
        ignore: Regular expressions of parameter names whose zeros may be lost.
        trained: The parameters of the optimizer, if the model has several optimizers.
        min_sparsity: See above.

    Raises:
        ValueError: A pattern selects nothing; or all weights are frozen, as under an adapter.
    """
    found = examine(model)
    trained = None if trained is None else list(trained)
    frozen = not any(p.requires_grad for name, p in found.parameters.items() if name not in found.adapters)
    if frozen and has_adapter(model):
        raise UserError(
            "the model trains an adapter alone, and its frozen weights lose no zero: train without KeepMask, and merge "
            "with elsa_lightning.adapters.merge_and_keep_zeros, which keeps the zeros and says what that costs"
        )
    chosen = list(targets or [ALL_LINEAR])
    if targets is None:
        others = set(found.parameters) - found.linear - found.vectors - found.adapters - set(found.computed)
        ours = {id(p) for p in (model.parameters() if trained is None else trained)}
        candidates = {n: p for n, p in found.parameters.items() if n in others and p.requires_grad and id(p) in ours}
        chosen += [f"^{re.escape(n)}$" for n, p in candidates.items() if _sparse(model, p, min_sparsity)]
    return select(model, chosen, ignore, trained=trained, quiet=True)


@dataclass(frozen=True)
class Frozen:
    """Sparse weights that are frozen (``requires_grad`` False) when training begins: nothing keeps their zeros.

    If they are trained later, as fine-tuning that unfreezes layers one by one does, these zeros are filled.

    Attributes:
        tensors: Those with enough zeros.
    """

    tensors: tuple[Counted, ...]

    @classmethod
    def of(
        cls, model: nn.Module, targets: Sequence[str] | None, ignore: Sequence[str], min_sparsity: float = MIN_SPARSITY
    ) -> Frozen:
        """Return those among the weights that :func:`sparse_weights` would choose if they were trained."""
        found = examine(model)
        linear = found.linear
        names = set(found.parameters) - found.vectors - found.adapters - set(found.computed)

        def watched(name: str) -> bool:
            meant = targets is None or any(name in linear if t == ALL_LINEAR else re.search(t, name) for t in targets)
            return bool(meant) and not any(re.search(pattern, name) for pattern in ignore)

        weights = {n: p for n, p in found.parameters.items() if n in names and p.is_floating_point() and not p.is_meta}
        frozen = {n: p for n, p in weights.items() if not p.requires_grad and watched(n)}
        counted = [Counted(n, *count_zeros(model, [p])) for n, p in frozen.items()]
        return cls(tuple(t for t in counted if t.zeros >= max(1, min_sparsity * t.size)))

    def __str__(self) -> str:
        """Return one line."""
        named = some([f"{t.name} ({t.zeros:,} zeros of {t.size:,})" for t in self.tensors], SHOWN)
        return (
            f"{len(self.tensors)} tensors are frozen (requires_grad False), and nothing keeps their zeros if they are "
            f"trained later: {named}. To keep them, let them require gradients when training begins"
        )

    def lost(self, model: nn.Module) -> str | None:
        """Return a warning that names the tensors that have fewer zeros now, or None."""
        if not self.tensors:
            return None
        parameters = examine(model).parameters
        now = {t: count_zeros(model, [parameters[t.name]])[0] for t in self.tensors if t.name in parameters}
        lost = [f"{t.name}: {t.zeros - zeros:,} of {t.zeros:,}" for t, zeros in now.items() if zeros < t.zeros]
        if not lost:
            return None
        return (
            f"zeros of {len(lost)} tensors were lost that were frozen when training began and were trained later "
            f"({some(lost, SHOWN)}). To keep them, let them require gradients when training begins, or train them in "
            f"a second run with its own KeepMask"
        )


def check_min_sparsity(value: float) -> float:
    """Return ``value``, or raise UserError if it is not a fraction of zeros."""
    if not 0 <= value <= 1:
        raise UserError(f"min_sparsity must be a fraction of zeros from 0 to 1, such as 0.05, got {value}")
    return value


def _sparse(model: nn.Module, p: nn.Parameter, least: float) -> bool:
    zeros, size = count_zeros(model, [p])
    return zeros >= max(1, least * size)

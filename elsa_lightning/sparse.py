"""Finds the weights of a model that are sparse already, for KeepMask and KeptZeros."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from elsa_lightning.adapters import has_adapter
from elsa_lightning.anatomy import examine
from elsa_lightning.errors import UserError
from elsa_lightning.layout.sharded import part_of
from elsa_lightning.report import some
from elsa_lightning.selection import ALL_LINEAR, Selection, can_train, count_zeros, select

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
    """Choose the weights whose zeros may be kept, frozen ones too.

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
        candidates = {
            n: p for n, p in found.parameters.items() if n in others and (id(p) in ours or not p.requires_grad)
        }
        chosen += [f"^{re.escape(n)}$" for n, p in candidates.items() if _sparse(model, p, min_sparsity)]
    return select(model, chosen, ignore, trained=trained, frozen=True, quiet=True)


@dataclass(frozen=True)
class Frozen:
    """Sparse weights that are frozen (``requires_grad`` False) when training begins.

    Attributes:
        tensors: Those with enough zeros.
        parameters: Their parameters by name.
    """

    tensors: tuple[Counted, ...] = ()
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, parameters: Mapping[str, nn.Parameter], min_sparsity: float) -> Frozen:
        """Return those among some weights that have enough zeros."""
        counted = [Counted(name, *count_zeros(model, [p])) for name, p in parameters.items()]
        return cls(tuple(t for t in counted if t.zeros >= max(1, min_sparsity * t.size)), dict(parameters))

    def __str__(self) -> str:
        """Return one line."""
        named = some([f"{t.name} ({t.zeros:,} zeros of {t.size:,})" for t in self.tensors], SHOWN)
        return f"{len(self.tensors)} tensors are frozen (requires_grad False): {named}. {self._then}"

    @property
    def _then(self) -> str:
        if any(part_of(p).start is not None for p in self.parameters.values()):  # FSDP1
            return "Nothing keeps their zeros if they are trained later: let them require gradients from the start"
        return "Their zeros are kept as soon as this optimizer trains them"

    def lost(self, model: nn.Module, held: Collection[str]) -> str | None:
        """Return a warning that names the tensors that have fewer zeros now and were not held meanwhile, or None."""
        free = [t for t in self.tensors if t.name not in held]
        now = {t: count_zeros(model, [self.parameters[t.name]])[0] for t in free}
        lost = [f"{t.name}: {t.zeros - zeros:,} of {t.zeros:,}" for t, zeros in now.items() if zeros < t.zeros]
        if not lost:
            return None
        return (
            f"zeros of {len(lost)} tensors were lost that were frozen when training began, and that something other "
            f"than this optimizer trained later ({some(lost, SHOWN)}). To keep them, let them require gradients when "
            f"training begins, or train them in a second run with its own KeepMask"
        )


def check_min_sparsity(value: float) -> float:
    """Return ``value``, or raise UserError if it is not a fraction of zeros."""
    if not 0 <= value <= 1:
        raise UserError(f"min_sparsity must be a fraction of zeros from 0 to 1, such as 0.05, got {value}")
    return value


def _sparse(model: nn.Module, p: nn.Parameter, least: float) -> bool:
    if not can_train(p):
        return False
    zeros, size = count_zeros(model, [p])
    return zeros >= max(1, least * size)

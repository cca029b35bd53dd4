"""KeptZeros: trains an already sparse model with any torch optimizer, without losing zeros."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning import exact
from elsa_lightning import update as updates
from elsa_lightning.admm import ADMM, take_from_others
from elsa_lightning.errors import UserError
from elsa_lightning.layout.sharded import exact_dtype, local
from elsa_lightning.patterns import USUAL, groups_of, satisfied
from elsa_lightning.report import some
from elsa_lightning.selection import count_zeros_of
from elsa_lightning.sets.base import Constraint, Points
from elsa_lightning.sparse import MIN_SPARSITY, SHOWN, Counted, Kept, check_min_sparsity
from elsa_lightning.tensors import KEYS, MASK, ConstrainedTensor


@dataclass(frozen=True, repr=False)
class _Zeros(Constraint):  # a public name would be a choice of --elsa.constraint
    """The set of weights with at least the zeros that they have."""

    def __repr__(self) -> str:
        """Return what checkpoints have among their settings."""
        return "Zeros()"

    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield the masks."""
        for point in points:
            yield point.v != 0


ZEROS = _Zeros()


class KeptZeros(ADMM):
    """Keeps the zeros of weights at 0 while an optimizer trains the rest; from then on its ``step()`` does that.

    Example::

        keep = KeptZeros(optimizer, sparse_weights(model).parameters)
        ...                      # the training loop as it was
        keep.finish()            # counts the zeros again

    The masks are the weights' own zeros, so any pattern is preserved, N:M too. Gradients are masked as soon as they are
    computed, so zeros do not affect clipping by norm, accumulation and the optimizer's moments; after the step the
    zeros are restored, whatever the optimizer did. Layers may be unfrozen meanwhile: frozen weights are kept from
    when the optimizer trains them. This is an :class:`~elsa_lightning.ADMM` whose mask is fixed from the
    start: to resume exactly, save ``optimizer.state_dict()`` and ``state_dict()``, attach a new one, and load both.

    Args:
        optimizer: Any torch optimizer, or accelerate's or Fabric's wrapper of one.
        parameters: The weights by name; see :func:`elsa_lightning.sparse.sparse_weights`. Frozen ones need not be the
            optimizer's yet.
        min_sparsity: Least fraction of zeros of a tensor whose zeros are kept; tensors with fewer are left alone.
        begin: Take the masks now. Use False if the weights have yet to be loaded, and call :meth:`begin` then.
        replicas: As in :class:`~elsa_lightning.admm.ADMM`.

    Attributes:
        kept: What is kept sparse, and what is left alone.
        later: Weights that are frozen so far. Flat slices (FSDP1) stay there.

    Raises:
        ValueError: No tensor has so many zeros, a parameter is not the optimizer's, or an argument is out of range.
    """

    _room = ()  # put_mask puts masks into the state

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        *,
        min_sparsity: float = MIN_SPARSITY,
        begin: bool = True,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        self.min_sparsity = check_min_sparsity(min_sparsity)
        self.kept = Kept((), ())
        self.later = {name: p for name, p in parameters.items() if not p.requires_grad}
        now = {name: p for name, p in parameters.items() if name not in self.later}
        super().__init__(optimizer, now, ZEROS, total_steps=sys.maxsize, replicas=replicas)
        self._gradients: dict[str, Any] = {}  # handles of the hooks that mask gradients
        self._mask_as_made()
        if begin:
            self.begin()

    def detach(self, saves: bool = False) -> None:
        """Remove the hooks from optimizer and parameters; the optimizer's state stays."""
        super().detach(saves)
        for handle in self._gradients.values():
            handle.remove()

    @torch.no_grad()
    def begin(self) -> None:
        """Take the masks from the current zeros of the weights.

        Raises:
            UserError: No tensor has enough zeros.
        """
        tensors = list(self.tensors.values())
        for tensor in tensors:  # another run may have left its tensors in the optimizer's state
            tensor.release(*KEYS)
        self._hooks.vouch()
        found = self._counted(tensors)
        known = list(found)
        if not any(map(self._is_sparse, known)) and not self.tensors.flat:
            known += [Counted(name, *count_zeros_of([p])) for name, p in self.later.items()]
        if not any(map(self._is_sparse, known)):
            most = max(known, key=lambda t: t.zeros / max(1, t.size), default=Counted("the frozen ones", 0, 0))
            raise UserError(
                f"no tensor has min_sparsity={self.min_sparsity:g} zeros; the most are in {most.name}, "
                f"{most.zeros:,} of {most.size:,}. This keeps the zeros of a model that is sparse already: load "
                f"its weights before, prune it with ElsaCallback, or lower min_sparsity"
            )
        self.kept, self.phase = self._keep(tensors, found), "finished"
        self._masked = len(self.tensors.holding(MASK))

    @torch.no_grad()
    def follow(self) -> Kept | None:
        """Keep the zeros of weights that were frozen, once the optimizer trains them; return these.

        Every step does so as soon as its gradients are final. Called right after layers are unfrozen, it masks
        their gradients from the first one on, also before they are clipped.
        """
        self._mask_as_made()
        unfrozen = {} if self.tensors.flat else {name: p for name, p in self.later.items() if p.requires_grad}
        joining = self._trained(unfrozen) if unfrozen else {}
        if self.phase != "setting up":
            dense = [n for n, p in joining.items() if not self._is_sparse(Counted(n, *count_zeros_of([p])))]
            self.later = {name: p for name, p in self.later.items() if name not in dense}
            joining = {name: p for name, p in joining.items() if name not in dense}
        if not joining:
            return None
        tensors = self._join(joining)
        if self.phase == "setting up":
            return None
        more = self._keep(tensors, self._counted(tensors))
        self.kept = Kept((*self.kept.kept, *more.kept), (*self.kept.left_alone, *more.left_alone))
        self._masked = len(self.tensors.holding(MASK))
        return more

    def _trained(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return those of some parameters that the optimizer has."""
        its = {p for group in self.optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in parameters.items() if p in its}

    def _join(self, parameters: Mapping[str, nn.Parameter]) -> list[ConstrainedTensor]:
        take_from_others(self.optimizer, parameters)
        tensors = self.tensors.take(parameters)
        self.later = {name: p for name, p in self.later.items() if name not in parameters}
        self._mask_as_made()
        return tensors

    def _is_sparse(self, t: Counted) -> bool:
        return t.zeros >= max(1, self.min_sparsity * t.size)

    def _counted(self, tensors: Sequence[ConstrainedTensor]) -> list[Counted]:
        return [Counted(tensor.name, zeros, _size(tensor)) for tensor, zeros in self._count_zeros(tensors).items()]

    def _keep(self, tensors: Sequence[ConstrainedTensor], found: Sequence[Counted]) -> Kept:
        """Take the masks of tensors, whose zeros were counted, if they have enough."""
        kept = [tensor for tensor, t in zip(tensors, found, strict=True) if self._is_sparse(t)]
        self._set_aside(kept)
        patterns = {tensor.name: pattern for tensor, pattern in self._patterns(kept).items()}
        self._clear_moments(kept)
        return Kept(
            tuple(replace(t, pattern=patterns[t.name]) for t in found if t.name in patterns),
            tuple(t for t in found if t.name not in patterns),
        )

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of zeros; needed before clipping only if gradients were set by hand or under FSDP1."""
        for tensor in self.tensors.values():
            self._mask_gradient(tensor)

    def finish(self, resumable: bool = False) -> None:
        """Restore zeros that were changed since the last step, with a warning, and count all zeros.

        Args:
            resumable: Makes no difference: a run can always be resumed.

        Raises:
            UserError: Some zeros were lost.
        """
        super().finish()
        self.check()

    def check(self) -> None:
        """Count the zeros of the weights again.

        Raises:
            UserError: A tensor has fewer zeros than at the beginning.
        """
        began = {t.name: t.zeros for t in self.kept.kept}
        now = self._count_zeros([self.tensors[name] for name in began])
        lost = {t.name: began[t.name] - zeros for t, zeros in now.items() if zeros < began[t.name]}
        if lost:
            named = some([f"{name}: {count:,} of {began[name]:,}" for name, count in lost.items()], SHOWN)
            raise UserError(f"zeros were lost although their places are held at 0 ({named})")

    def state_dict(self) -> dict[str, Any]:
        """Return the scalars, and which tensors are kept sparse; the masks are in the optimizer's state."""
        kept, left = (
            [[t.name, t.zeros, t.size, t.pattern] for t in of] for of in (self.kept.kept, self.kept.left_alone)
        )
        aside = [tensor.name for tensor in self.tensors.values() if tensor.aside is not None]
        return {**super().state_dict(), "kept": kept, "left_alone": left, "aside": aside}

    def _lacks_masks(self, state_dict: dict[str, Any]) -> bool:
        """Return whether masks are missing that the optimizer's state had when it was saved."""
        masked, aside = set(self.tensors.masked()), state_dict.get("aside", [])
        return any(self.tensors[t[0]] not in masked for t in state_dict["kept"] if t[0] not in aside)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore masks and scalars, after model and optimizer were loaded.

        Raises:
            ValueError: The state is of a run with other settings, or not of KeptZeros.
        """
        if "kept" not in state_dict:
            raise UserError(
                "the state is of a run that prunes, not of one that keeps zeros: load its weights and begin anew"
            )
        counted = [t[0] for key in ("kept", "left_alone") for t in state_dict[key]]
        if not self.tensors.flat:
            self._join(self._trained({name: p for name, p in self.later.items() if name in counted}))
        self.tensors.arrange(state_dict.get("order", []))
        for tensor in self.tensors.values():
            tensor.aside = None
        super().load_state_dict(state_dict)
        self._waiting = []  # KeptZeros never projects
        self.kept = Kept(*(tuple(Counted(*numbers) for numbers in state_dict[key]) for key in ("kept", "left_alone")))
        kept = [self.tensors[t.name] for t in self.kept.kept]
        masked = set(self.tensors.masked())
        self._set_aside([tensor for tensor in kept if tensor not in masked])  # had no gradient yet
        self._masked = len(self.tensors.holding(MASK))

    # ------------------------------------------------------------------ inside the training loop

    def _gradients_are_final(self, loss: Any) -> None:
        if not self.paused:
            if self.phase == "setting up":
                self.begin()
            self.follow()
            self.mask_gradients()
        super()._gradients_are_final(loss)

    @torch.no_grad()
    def _after_step(self) -> None:
        super()._after_step()
        settled = [t for t in self.tensors.values() if t.aside is not None and self._has_room(t)]
        for tensor in settled:  # not before its first step: the optimizer would take our state for its own
            tensor.put_mask()
        if settled:
            self._copies = sorted({*self._copies, *exact.weight_copies(settled, self.tensors.processes)})

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.tensors.parts)  # all that is sparse may be frozen still

    def _has_room(self, tensor: ConstrainedTensor) -> bool:
        return bool(tensor.state) or self.tensors.flat or (self.step > 0 and tensor.p.grad is not None)

    def _mask_as_made(self) -> None:
        """Have gradients masked as soon as they are made, of all weights that require some by now."""
        if self.tensors.flat:
            return
        for name, tensor in self.tensors.items():
            if name not in self._gradients and tensor.p.requires_grad:
                self._gradients[name] = self._mask_when_there(tensor)

    def _mask_when_there(self, tensor: ConstrainedTensor) -> Any:
        keeper, name = weakref.ref(self), tensor.name  # a strong reference would keep the optimizer alive

        def mask(_: Tensor) -> None:
            here = keeper()
            if here is None or here.paused:
                return
            if here.phase == "setting up":
                if here.sharded:
                    raise UserError("the weights are sharded: call begin() before the first backward pass")
                here.begin()
            if (mine := here.tensors.get(name)) is not None:  # else another ADMM has taken it over
                here._mask_gradient(mine)

        return tensor.p.register_post_accumulate_grad_hook(mask)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _mask_gradient(self, tensor: ConstrainedTensor) -> None:
        if tensor.p.grad is None or tensor.p.grad.is_sparse or not tensor.has(MASK):
            return
        for rows, *_ in tensor.pieces():
            tensor.grad(rows).masked_fill_(~tensor.mask(rows), 0)  # not a product, which keeps NaN

    # ------------------------------------------------------------------ looking at the weights

    def _set_aside(self, tensors: Sequence[ConstrainedTensor]) -> None:
        if tensors:
            weights, processes = (lambda tensor, rows: tensor.x(rows)), self.tensors.processes
            points = updates.LivePoints(tensors, weights, None, processes)
            for tensor, packed in zip(tensors, updates.decide(self.constraint, points), strict=True):
                tensor.aside = packed

    def _clear_moments(self, tensors: Sequence[ConstrainedTensor]) -> None:
        """Zero the optimizer's moments of the zeros, left from an earlier run, where they are stored as floats."""
        for tensor in tensors:
            for value in tensor.state.values():
                alike = isinstance(value, Tensor) and value.is_floating_point()
                if alike and local(value).shape == local(tensor.p).shape:
                    for rows, *_ in tensor.pieces():
                        tensor.layout.take(value, rows).masked_fill_(~tensor.mask(rows), 0)

    def _count_zeros(self, tensors: Sequence[ConstrainedTensor]) -> dict[ConstrainedTensor, int]:
        """Return the zeros of each tensor, over all processes."""
        counts = torch.zeros(len(tensors), dtype=exact_dtype(self.tensors.device), device=self.tensors.device)
        for index, tensor in enumerate(tensors):
            for rows, *_ in tensor.pieces() if tensor.part.counts else ():
                counts[index] += (tensor.x(rows) == 0).sum()
        return dict(zip(tensors, map(int, self.tensors.processes.add(counts).tolist()), strict=True))

    def _patterns(self, tensors: Sequence[ConstrainedTensor]) -> dict[ConstrainedTensor, str | None]:
        """Return the N:M pattern of each tensor's zeros, or None; also None where shards cut groups."""
        names = [f"{n}:{m}" for n, m in USUAL]
        counts = torch.zeros(len(tensors), len(USUAL), dtype=torch.float32, device=self.tensors.device)
        for index, tensor in enumerate(tensors):
            cut = tensor.part.sharded and (tensor.layout.transposed or tensor.layout.shape[-1] < tensor.part.shape[-1])
            if cut or tensor.part.start is not None:
                counts[index] = 1  # counts as a violation
                continue
            kept = tensor.layout.take(tensor.p.detach(), slice(0, tensor.layout.count)).view(tensor.layout.shape) != 0
            kept = kept.transpose(-1, -2) if tensor.layout.transposed else kept
            found = groups_of(kept)
            violating = [found[name].violating if name in found else 1 for name in names]
            counts[index] = torch.tensor(violating, dtype=counts.dtype)
        numbers = self.tensors.processes.add(counts).tolist()
        return {t: satisfied(dict(zip(names, row, strict=True))) for t, row in zip(tensors, numbers, strict=True)}


def _size(tensor: ConstrainedTensor) -> int:
    return tensor.part.shape.numel()

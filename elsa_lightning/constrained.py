"""All constrained tensors of one optimizer, and the processes among which they are sharded."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.errors import UserError
from elsa_lightning.layout.fsdp1 import DenseState, check_marked
from elsa_lightning.layout.kernels import is_transposed, matrix_shape
from elsa_lightning.layout.lowbit import BLOCK, StateDtype
from elsa_lightning.layout.sharded import check_grain, clean, local, parts_of, processes_of
from elsa_lightning.optim.moments import dtype_name, set_up
from elsa_lightning.sets.base import Constraint
from elsa_lightning.tensors import DENSE, KEYS, MASK, ConstrainedTensor


class ConstrainedTensors(Mapping[str, ConstrainedTensor]):
    """The constrained tensors by name.

    Attributes:
        processes: The processes that hold the optimizer's parameters between them.
        parts: The part of each of the optimizer's parameters that this process holds.
        flat: Whether some are flat slices (FSDP1).
        places: Index of each constrained parameter among all.
        constraint: The set, sized for these tensors.

    Args:
        optimizer: The optimizer that trains the parameters.
        parameters: The parameters by name.
        constraint: The set; it checks whether the parameters can be in it.
        state_dtype: The dtype in which the splits are stored.

    Raises:
        ValueError: A parameter is not the optimizer's, or cannot be in the set.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], constraint: Constraint,
        state_dtype: StateDtype,
    ) -> None:  # fmt: skip
        self.optimizer, self.state_dtype = optimizer, state_dtype
        names: dict[nn.Parameter, str] = {}
        for name, p in parameters.items():
            if (other := names.setdefault(p, name)) != name:
                raise UserError(f"{other} and {name} are one parameter: name it once")
            check_marked(name, p)
        self.find_parts()
        whole = {
            name: self.parts[p].shape if p in self.parts else matrix_shape(p, p.shape) for name, p in parameters.items()
        }
        constraint.check(whole, [name for name, p in parameters.items() if is_transposed(p)])
        each = {name: p.element_size() for name, p in parameters.items()}
        self.constraint = constraint = constraint.sized(whole, each)
        self._tensors = {name: self._constrain(name, p, constraint) for name, p in parameters.items()}
        self.places = {tensor.p: place for place, tensor in enumerate(self._tensors.values())}
        by_parameter = {tensor.p: tensor for tensor in self._tensors.values()}
        self._dense = DenseState(optimizer, by_parameter, KEYS, DENSE)

    def find_parts(self) -> None:
        """Find the parts of the optimizer's parameters; called again after a parameter group was added."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.processes = processes_of(trained)
        self.parts = parts_of(trained, self.processes)
        self.flat = any(part.start is not None for part in self.parts.values())
        self._seeds = {p: place for place, p in enumerate(self.parts)}
        self.device = trained[0].device

    def _constrain(self, name: str, p: nn.Parameter, constraint: Constraint) -> ConstrainedTensor:
        part = self.parts.get(p)
        if part is None:
            raise UserError(
                f"{name} is constrained but {type(self.optimizer).__name__} does not train it; give the optimizer that "
                f"does, or leave the parameter out"
            )
        if not part.shape.numel():
            raise UserError(f"{name} of shape {tuple(part.shape)} has no entries: leave it out")
        if p.is_complex():
            raise UserError(
                f"{name} is {dtype_name(p.dtype)}, and sets rank real weights: leave it out, in select() with "
                f"ignore=['{re.escape(clean(name))}$']"
            )
        if p.is_meta:
            raise UserError(
                f"{name} is on the meta device, which has shapes and no weights: materialise the model first "
                f"(model.to_empty(device=...), then load its weights), then make its optimizer"
            )
        rows, columns = constraint.grain_of(name)
        if is_transposed(p):
            rows, columns = columns, rows
        rows, columns = rows or part.shape[-2], columns or part.shape[-1]
        shared = constraint.shared(name)
        if shared is not None:
            high, wide = reversed(shared) if is_transposed(p) else shared
            shared = (high or part.shape[-2], wide or part.shape[-1])
        if part.start is not None and (rows * columns > 1 or shared is not None):
            raise UserError(
                f"{name}: {type(constraint).__name__} keeps {rows} × {columns} entries together, and flat slices "
                f"(FSDP1) cut anywhere: shard the model with ModelParallelStrategy (FSDP2)"
            )
        if part.start is not None and len(part.shape) > 2 and math.prod(part.shape[-2:]) % BLOCK:
            raise UserError(
                f"{name} is a stack of matrices of {math.prod(part.shape[-2:])} entries, and in flat slices (FSDP1) "
                f"these must be a multiple of {BLOCK}: shard the model with ModelParallelStrategy (FSDP2)"
            )
        check_grain(name, p, rows, columns, BLOCK if self.state_dtype == "float8_e4m3fn" else 8)
        return ConstrainedTensor(name, p, part, self.optimizer, self.state_dtype, rows, shared)

    def __getitem__(self, name: str) -> ConstrainedTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def give_up(self, parameters: Collection[nn.Parameter]) -> None:
        """Constrain some parameters no longer; the indices of the others stay."""
        self._tensors = {name: tensor for name, tensor in self.items() if tensor.p not in parameters}
        self.places = {tensor.p: self.places[tensor.p] for tensor in self.values()}

    def take(self, parameters: Mapping[str, nn.Parameter]) -> list[ConstrainedTensor]:
        """Constrain more parameters, which the optimizer may have got meanwhile; return their tensors."""
        self.find_parts()
        whole = {name: matrix_shape(p, self.parts[p].shape) for name, p in parameters.items() if p in self.parts}
        self.constraint.check(whole, [name for name, p in parameters.items() if is_transposed(p)])
        new = {name: self._constrain(name, p, self.constraint) for name, p in parameters.items()}
        first = max(self.places.values(), default=-1) + 1
        self._tensors |= new
        self.places |= {tensor.p: place for place, tensor in enumerate(new.values(), first)}
        return list(new.values())

    def arrange(self, described: Sequence[str]) -> None:
        """Bring the tensors into the order of their descriptions, where these are those of the tensors."""
        names = {tensor.described: name for name, tensor in self.items()}
        if sorted(described) == sorted(names):
            self._tensors = {names[each]: self[names[each]] for each in described}
            self.places = {tensor.p: place for place, tensor in enumerate(self.values())}

    def remove(self) -> None:
        """Remove the hooks by which FSDP1 saves our state."""
        self._dense.remove()

    def holding(self, key: str) -> list[ConstrainedTensor]:
        """Return the tensors whose state has ``key``, a tensor of ours, on this process."""
        return [tensor for tensor in self.values() if tensor.has(key)]

    def agreed(self, flags: Sequence[bool], tensors: Collection[ConstrainedTensor]) -> list[ConstrainedTensor]:
        """Return the tensors whose flag is set on any process: one with an empty flat slice cannot tell by itself."""
        answers = self.processes.any(flags, self.device) if self.flat else flags
        return [tensor for tensor, yes in zip(tensors, answers, strict=True) if yes]

    def masked(self) -> list[ConstrainedTensor]:
        """Return the tensors that have a mask on any process."""
        tensors = list(self.values())
        return self.agreed([tensor.has(MASK) for tensor in tensors], tensors)

    def seed(self, call: int, p: nn.Parameter, use: int) -> int:
        """Return a seed of step, tensor and use alone, so that resumed runs and other shardings draw the same."""
        return (call << 24) + (self._seeds[p] << 2) + use

    def each_mask(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the existing masks by name, in the shape of this process's part."""
        for name, tensor in self.items():
            if tensor.has(MASK):
                yield name, tensor.layout.shaped(tensor.mask(slice(0, tensor.layout.count)), local(tensor.p))

    def expect(self, keys: Mapping[nn.Parameter, Collection[str]]) -> None:
        """Allocate state that will be loaded by name, since such loading fills only tensors that exist.

        Args:
            keys: Names of the tensors in each parameter's state.
        """
        set_up(self.optimizer, [p for p, names in keys.items() if set(names) - set(KEYS)])
        for tensor in self.values():
            names = [key for key in KEYS if key in keys.get(tensor.p, ())]
            tensor.release(*KEYS)
            tensor.allocate(*names)

    def take_over(self) -> None:
        """Restore loaded state that torch cast or FSDP1 saved densely; give every process the same keys."""
        for tensor in self.values():
            tensor.cast_back()
        self._dense.take()
        tensors = list(self.values())
        for key in KEYS if self.flat else ():
            for tensor in self.agreed([tensor.has(key) for tensor in tensors], tensors):
                tensor.allocate(key)

"""Decoding on a CPU without multiplying zeros: linear layers in torch's compressed sparse row format (CSR).

MKL has fast kernels for int32 indices and float32 values, but no products in bfloat16, so the model is float32.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from elsa_lightning.errors import UnavailableError, UserError

FILE = "cpu_sparse.safetensors"
# Measured on one thread with benchmarks/decode/products.py; see docs/exports.md.
BREAK_EVEN = 0.6  # share of zeros from which decoding is faster than in dense float32
_ROUNDING = 1e-3  # share of zeros that the rounding to whole weights may take
BLOCK = 32  # rows of x in one product, if there are several; larger products are slower


class CSRLinear(nn.Module):
    """A linear layer, x Wᵀ + b, whose W is stored as compressed sparse rows. For inference.

    Attributes:
        crow_indices: Index of each row's first value, int32 ``(out + 1,)``.
        col_indices: Columns of the values, int32 ``(values,)``.
        values: Non-zeros, float32 ``(values,)``.
        bias: float32 ``(out,)``, or None.

    Args:
        out_features: Rows of W.
        in_features: Columns of W.
        values: Number of non-zeros.
        bias: Whether the layer has a bias.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, out_features: int, in_features: int, values: int, bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("crow_indices", torch.zeros(out_features + 1, dtype=torch.int32))
        self.register_buffer("col_indices", torch.zeros(values, dtype=torch.int32))
        self.register_buffer("values", torch.zeros(values, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self._matrix: Tensor | None = None
        self._made_of = 0  # address of the values that _matrix shares

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, bias: Tensor | None) -> CSRLinear:
        """Return the layer of a dense weight ``(out, in)``."""
        kept = weight != 0
        rows = kept.sum(dim=1)
        layer = cls(weight.shape[0], weight.shape[1], int(rows.sum()), bias is not None)
        layer.crow_indices[1:] = rows.cumsum(0)
        layer.col_indices.copy_(kept.nonzero()[:, 1])
        layer.values.copy_(weight[kept])
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
        return layer

    @property
    def zeros(self) -> int:
        """Number of zeros of W."""
        return self.out_features * self.in_features - int(torch.count_nonzero(self.values))

    def matrix(self) -> Tensor:
        """Return W ``(out, in)`` as a sparse tensor of torch, which shares the memory of the values."""
        values = self.values
        if self._matrix is None or values.data_ptr() != self._made_of:  # made anew if the values moved
            size = (self.out_features, self.in_features)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")  # beta; checked before
                self._matrix = torch.sparse_csr_tensor(
                    self.crow_indices, self.col_indices, values, size=size, check_invariants=False
                )
            self._made_of = values.data_ptr()
        return self._matrix

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``.

        Raises:
            UserError: The last dimension is wrong.
        """
        if x.shape[-1] != self.in_features:
            raise UserError(f"a layer of {self.in_features} inputs was given {x.shape[-1]}: shape {tuple(x.shape)}")
        w, bias = self.matrix(), self.bias
        if x.numel() == self.in_features and x.dtype == w.dtype:  # decoding: every microsecond here counts
            y = torch.mv(w, x.reshape(-1)) if bias is None else torch.addmv(bias, w, x.reshape(-1))
            return y.view(*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features).to(w.dtype)
        y = torch.cat([(w @ block.T.contiguous()).T for block in torch.split(rows, BLOCK)])
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def check(self) -> None:
        """Raise UserError if indices point outside of the matrix, which products would not notice."""
        starts, columns = self.crow_indices, self.col_indices
        ends = int(starts[0]) == 0 and int(starts[-1]) == len(columns) == len(self.values)
        inside = not len(columns) or (int(columns.min()) >= 0 and int(columns.max()) < self.in_features)
        if not (ends and inside and bool((starts.diff() >= 0).all())):
            raise UserError(f"{FILE} is broken: indices point outside of a matrix of {self.in_features} columns")

    def __getstate__(self) -> dict[str, Any]:
        """Leave torch's sparse tensor out of copies; it is made anew there."""
        return {**self.__dict__, "_matrix": None}

    def extra_repr(self) -> str:
        """Return the shape and the share of zeros."""
        size = self.out_features * self.in_features
        return f"{self.in_features}, {self.out_features}, sparsity={1 - len(self.values) / max(1, size):.3f}"


def to_cpu_sparse(model: nn.Module, break_even: float = BREAK_EVEN) -> nn.Module:
    """Replace linear layers with enough zeros by :class:`CSRLinear`, and move the rest to float32 on the CPU.

    Linear layers are ``nn.Linear``, subclasses with the same result (Falcon's), and GPT-2's ``Conv1D``; a layer that
    shares its weight with an embedding stays dense.

    Args:
        model: A model of transformers, or any module; changed in place.
        break_even: Least share of zeros of a layer that is replaced.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: No layer has enough zeros.
    """
    if not 0 <= break_even <= 1:
        raise UserError(f"break_even is a share of zeros from 0 to 1, got {break_even}")
    shares = shares_of_zeros(model)
    if not any(is_enough(share, break_even) for share in shares.values()):
        most = max(shares.values(), default=0.0)
        raise UserError(
            f"no linear layer has {break_even:.0%} zeros, from which on sparse products are faster; the sparsest has "
            f"{most:.2%}: keep the model dense, or set break_even if you measured another"
        )
    model.to("cpu", torch.float32).eval().requires_grad_(False)
    made: dict[nn.Module, CSRLinear] = {}
    for name, layer in list(_linear(model).items()):
        if is_enough(shares[name], break_even):
            if layer not in made:
                made[layer] = CSRLinear.of(_weight(layer), layer.bias)  # type: ignore[arg-type]
            model.set_submodule(name, made[layer])
    return _in_float32(model)


def is_enough(share: float, break_even: float) -> bool:
    """Return whether a layer has enough zeros; a set keeps whole weights, so 60 % may be 59.999 % of a tensor."""
    return share >= break_even - _ROUNDING


def shares_of_zeros(model: nn.Module) -> dict[str, float]:
    """Return the share of zeros of each linear layer that could be replaced, by module name."""
    return {name: float((_weight(layer) == 0).float().mean()) for name, layer in _linear(model).items()}


def _in_float32(model: nn.Module) -> nn.Module:
    if (config := getattr(model, "config", None)) is not None:
        config.dtype = torch.float32
    return model


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    holders: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), set()).add(module)
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if (type(module) is Conv1D or _only_multiplies(module)) and len(holders[id(module.weight)]) == 1
    }


@torch.no_grad()
def _only_multiplies(module: nn.Module) -> bool:
    """Return whether a layer is ``nn.Linear``, or a subclass with the same result, unlike adapters."""
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or "weight" not in module._parameters or any(module.children()):
        return False
    ramp = torch.linspace(-1, 1, module.in_features).to(module.weight)
    x = torch.stack([ramp, ramp.square(), -ramp.cos()])
    try:
        y = module(x)
    except Exception:  # a foreign forward may need other arguments
        return False
    return isinstance(y, Tensor) and torch.allclose(y, nn.functional.linear(x, module.weight, module.bias), 1e-3, 1e-4)


def _weight(layer: nn.Module) -> Tensor:
    """Return W ``(out, in)``; Conv1D stores its transpose."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight if isinstance(layer, nn.Linear) else weight.T


def save_cpu_sparse(model: Any, folder: str | Path) -> None:
    """Save a model of transformers that :func:`to_cpu_sparse` converted, for :func:`load_cpu_sparse`.

    Args:
        model: The model, with layers of compressed rows.
        folder: Folder for ``config.json``, ``generation_config.json`` and ``cpu_sparse.safetensors``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, CSRLinear)}
    sizes = {n: [m.out_features, m.in_features, len(m.values), m.bias is not None] for n, m in layers.items()}
    save_model(model, str(folder / FILE), metadata={"format": "pt", "layers": json.dumps(sizes)})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


@torch.no_grad()
def _fill(model: nn.Module, file: Path) -> None:
    """Read a model's tensors one by one, so that at most one of them is in memory twice."""
    state, filled = model.state_dict(), set[int]()
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
    for name in names:
        with safe_open(file, framework="pt") as opened:  # reopened, else pages already read stay mapped
            t, ours = opened.get_tensor(name), state.get(name)
            if ours is None or (ours.shape, ours.dtype) != (t.shape, t.dtype):
                raise UserError(f"{str(file)!r} is broken: {name} is not of this model; export it anew")
            ours.copy_(t)
            del t
        filled.add(ours.data_ptr())
    if missing := [name for name, t in state.items() if t.data_ptr() not in filled]:  # shared ones are stored once
        raise UserError(f"{str(file)!r} is broken: {missing[0]} is not in it; export it anew")


def load_cpu_sparse(folder: str | Path) -> Any:
    """Load a model that :func:`save_cpu_sparse` wrote; the file has plain tensors, and none of its content is executed.

    Args:
        folder: Folder of the export.

    Returns:
        The model of transformers in evaluation mode, float32 on the CPU; ``generate`` works.

    Raises:
        UserError: The folder is not such an export, or its indices are broken.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    file = Path(folder) / FILE
    if not file.is_file():
        raise UnavailableError(f"{str(folder)!r} has no {FILE}: give a folder that elsa export --to cpu-sparse wrote")
    config = AutoConfig.from_pretrained(folder)
    build: Any = AutoModelForCausalLM.from_config
    with no_init_weights():  # unwritten memory costs nothing
        model = build(config, dtype=torch.float32)
    with safe_open(file, framework="pt") as opened:
        sizes = json.loads((opened.metadata() or {}).get("layers", "{}"))
    for name, (rows, columns, values, bias) in sizes.items():
        model.set_submodule(name, CSRLinear(rows, columns, values, bias))
    model.tie_weights()
    _fill(model, file)
    for layer in model.modules():
        if isinstance(layer, CSRLinear):
            layer.check()
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval().requires_grad_(False)

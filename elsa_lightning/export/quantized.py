"""W4A16 and W8A16 in the ``pack-quantized`` format of compressed-tensors: packed integers, a scale a group, zeros kept.

Files are written directly from codes and scales. Weights that already lie on a symmetric grid (scale × integer, one
scale a group) are recognised and stored without loss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elsa_lightning.anatomy import is_conv1d, stacks
from elsa_lightning.errors import UserError
from elsa_lightning.export.folders import edit

BITS = (4, 8)
_SIZES = (16, 32, 64, 128, 256)  # group sizes to propose
_ROWS = 1 << 22  # entries processed at once


class Grid(NamedTuple):
    """A weight ``(out, in)`` on a symmetric grid.

    Attributes:
        codes: int8 ``(out, in)``, in ±(2^(bits−1) − 1).
        scales: ``(out, groups)``, none of them 0.
    """

    codes: Tensor
    scales: Tensor

    def weight(self) -> Tensor:
        """Return scale × code, rounded as at unpacking: in the dtype of the scales."""
        groups = self.codes.view(*self.scales.shape, -1).to(self.scales.dtype)
        return (groups * self.scales[..., None]).view(self.codes.shape)


def check_groups(model: nn.Module, bits: int, group_size: int) -> dict[str, nn.Linear]:
    """Return the linear layers to quantize by name: all but output layers.

    Args:
        model: The model of transformers.
        bits: 4 or 8.
        group_size: Entries of a row that share a scale; 0 for the whole row.

    Raises:
        UserError: The group size does not divide a row, or there is no linear layer.
    """
    if bits not in BITS:
        raise UserError(f"bits must be one of {BITS}, got {bits}")
    if found := stacks(model):
        raise UserError(
            f"{found[0]} is a stack of experts, which compressed-tensors cannot load into this transformers: export "
            f"--to hf"
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    if not layers:
        kinds = " and ".join(sorted({type(m).__name__ for m in _others(model)}))
        raise UserError(
            f"the model has no nn.Linear to quantize beside its output layer{f', only {kinds}' if kinds else ''}, and "
            f"compressed-tensors knows no other kind of layer: export --to hf or cpu-sparse"
        )
    good = [size for size in _SIZES if all(m.in_features % size == 0 for m in layers.values())]
    if group_size < 0 or (group_size and any(m.in_features % group_size for m in layers.values())):
        name, layer = next(
            (n, m) for n, m in layers.items() if group_size < 0 or m.in_features % max(1, group_size)
        )  # fmt: skip
        raise UserError(
            f"group_size {group_size} does not divide the {layer.in_features} columns of {name}: give "
            f"{' or '.join(map(str, good)) + ', or ' if good else ''}0, which is one scale a row"
        )
    return layers


def _others(model: nn.Module) -> list[nn.Module]:
    """Return layers that multiply like linear ones, but that compressed-tensors does not treat as such."""
    return [m for m in model.modules() if is_conv1d(m) or (isinstance(m, nn.Linear) and type(m) is not nn.Linear)]


@torch.no_grad()
def find_grid(
    weight: Tensor,
    bits: int,
    group_size: int = 0,
    dtype: torch.dtype | None = None,
    product: torch.dtype | None = None,
) -> Grid:
    """Return the symmetric grid on which a weight lies, if there is one with scales of this dtype, else a rounded one.

    The scale of a group is its largest magnitude divided by a code: by one that makes all entries of the group whole
    multiples of the scale, if there is one, else by the largest code, 2^(bits−1) − 1, and entries are rounded.

    Args:
        weight: ``(out, in)``, floating.
        bits: Bits of the codes.
        group_size: Columns that share a scale; 0 for all.
        dtype: The dtype of the scales; None takes the weight's.
        product: The dtype in which unpacking multiplies; None takes the scales'.
    """
    dtype = dtype or weight.dtype
    product = product or dtype
    group = group_size or weight.shape[1]
    at_once = max(1, _ROWS // weight.shape[1])
    pieces = [_grid(rows.reshape(-1, group), bits, dtype, product) for rows in torch.split(weight.detach(), at_once)]
    codes = torch.cat([codes for codes, _ in pieces]).view(weight.shape)
    return Grid(codes, torch.cat([scales for _, scales in pieces]).view(len(weight), -1))


def _grid(groups: Tensor, bits: int, dtype: torch.dtype, product: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes and scales of groups ``(n, size)``."""
    most = (1 << (bits - 1)) - 1
    largest = groups.abs().amax(dim=1).double()
    codes, scales = _coded(groups, _safe(largest / most, dtype), most)
    open_ = (~_exact(groups, codes, scales, product)).nonzero().flatten()
    if len(open_) > 256 and not _search(groups[open_[:: len(open_) // 128]], bits, dtype, product)[2].any():
        return codes, scales  # no group of a sample is on a grid
    found, its, done = _search(groups[open_], bits, dtype, product)
    codes[open_[done]], scales[open_[done]] = found[done], its[done]
    return codes, scales


def _search(groups: Tensor, bits: int, dtype: torch.dtype, product: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and scales of groups, and a mask of the groups that lie exactly on a grid that was found."""
    most = (1 << (bits - 1)) - 1
    largest = groups.abs().amax(dim=1).double()
    codes = torch.zeros(groups.shape, dtype=torch.int8)
    scales = torch.ones(len(groups), dtype=dtype)
    done = torch.zeros(len(groups), dtype=torch.bool)
    for code in range(most, 0, -1):
        for step in (0, 1, -1, 2, -2):  # rounding of product and quotient may shift the scale
            left = (~done).nonzero().flatten()
            if not len(left):
                return codes, scales, done
            scale = _neighbour(_safe(largest[left] / code, dtype), step)
            its, _ = _coded(groups[left], scale, most)
            hit = _exact(groups[left], its, scale, product)
            codes[left[hit]], scales[left[hit]], done[left[hit]] = its[hit], scale[hit], True
    return codes, scales, done


def _safe(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales cast to a dtype; 1 where the result is 0, as for a group of zeros, or not finite."""
    cast = scale.to(dtype)
    return torch.where((cast > 0) & cast.isfinite(), cast, torch.ones((), dtype=dtype))


def _neighbour(scale: Tensor, step: int) -> Tensor:
    if step == 0:
        return scale
    bits = torch.int16 if scale.dtype.itemsize == 2 else torch.int32 if scale.dtype.itemsize == 4 else torch.int64
    moved = (scale.view(bits) + step).view(scale.dtype)  # neighbouring numbers, for positive scales
    return torch.where((moved > 0) & moved.isfinite(), moved, scale)


def _coded(groups: Tensor, scale: Tensor, most: int) -> tuple[Tensor, Tensor]:
    codes = (groups.double() / scale.double()[:, None]).round_().clamp_(-most, most).to(torch.int8)
    return codes, scale


def _exact(groups: Tensor, codes: Tensor, scale: Tensor, product: torch.dtype) -> Tensor:
    """Return a mask of the groups whose values codes and scales reproduce exactly."""
    return (codes.to(product) * scale.to(product)[:, None] == groups).all(dim=1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes ``(out, in)`` as int32 ``(out, ⌈in · bits / 32⌉)``, the first column in the lowest bits.

    2^(bits−1) is added to the codes, so that none is negative.
    """
    each = 32 // bits
    unsigned = codes.to(torch.int64) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % each)).view(len(codes), -1, each)
    words = (unsigned << (torch.arange(each) * bits)).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes that :func:`pack` packed."""
    shifts = torch.arange(32 // bits) * bits
    codes: Tensor = (packed.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)
    return (codes.view(len(packed), -1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


@torch.no_grad()
def write_quantized(model: Any, folder: Path, bits: int = 4, group_size: int = 128) -> dict[str, Any]:
    """Write a model of transformers with its linear layers packed, and set the model's weights to the rounded ones.

    Args:
        model: The model; its linear layers except the output layer are quantized, all else stays in its dtype.
        folder: The folder to write.
        bits: 4 or 8.
        group_size: Entries of a row that share a scale; 0 for the whole row.

    Returns:
        The cost of rounding: ``layers``, ``exact layers``, ``relative error`` of the weights (‖W − Ŵ‖ / ‖W‖), and how
        many layers are of kinds that are not quantized, if any.

    Raises:
        UserError: See :func:`check_groups`.
    """
    layers = check_groups(model, bits, group_size)
    packed: dict[str, Tensor] = {}
    moved = whole = 0.0
    exact = 0
    for name, layer in layers.items():
        grid = find_grid(layer.weight, bits, group_size)
        rounded = grid.weight()
        error = float((rounded.double() - layer.weight.double()).square().sum())
        moved, whole = moved + error, whole + float(layer.weight.double().square().sum())
        exact += error == 0
        packed[f"{name}.weight_packed"] = pack(grid.codes, bits)
        packed[f"{name}.weight_scale"] = grid.scales
        packed[f"{name}.weight_shape"] = torch.tensor(grid.codes.shape)
        layer.weight.copy_(rounded)
    model.save_pretrained(folder)
    _exchange(folder, {f"{name}.weight" for name in layers}, packed)
    edit(folder / "config.json", quantization_config=_config(model, set(layers), bits, group_size))
    return {
        "scheme": f"W{bits}A16, {'a scale a row' if not group_size else f'groups of {group_size}'}",
        "layers": len(layers),
        "exact layers": exact,
        "relative error of the weights": (moved / whole) ** 0.5 if whole else 0.0,
        **({"layers of other kinds, left as they are": len(others)} if (others := _others(model)) else {}),
    }


def _exchange(folder: Path, names: set[str], packed: dict[str, Tensor]) -> None:
    """Replace weights by packed tensors in a folder's safetensors files."""
    index = folder / "model.safetensors.index.json"
    where: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            kept = {name: tensors.get_tensor(name) for name in tensors.keys() if name not in names}  # noqa: SIM118
            mine = [name for name in tensors.keys() if name in names]  # noqa: SIM118
        for name in mine:
            kept |= {key: packed[key] for key in (f"{name}_{part}" for part in ("packed", "scale", "shape"))}
        save_file(kept, file.with_suffix(".tmp"), metadata={"format": "pt"})
        file.with_suffix(".tmp").replace(file)
        where |= dict.fromkeys(kept, file.name)
    if index.exists():
        size = sum((folder / name).stat().st_size for name in set(where.values()))
        edit(index, weight_map=where, metadata={"total_size": size})
    if left := packed.keys() - where.keys():
        raise UserError(f"{sorted(left)[0]} is not among what transformers saves of this model: export --to hf")


def _config(model: nn.Module, packed: set[str], bits: int, group_size: int) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size or None,
        "dynamic": False,
    }
    scheme = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed],
        "config_groups": {"group_0": scheme},
    }


def load_unpacked(folder: str | Path) -> Any:
    """Return the model of a quantized export with plain weights, without compressed-tensors.

    Args:
        folder: A folder that :func:`write_quantized` wrote.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = Path(folder)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = described["config_groups"]["group_0"]["weights"]["num_bits"]
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            state |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    for name in [name for name in state if name.endswith(".weight_packed")]:
        base = name.removesuffix("_packed")
        codes = unpack(state.pop(name), bits, int(state.pop(f"{base}_shape")[1]))
        state[base] = Grid(codes, state.pop(f"{base}_scale")).weight()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=config.dtype).eval()

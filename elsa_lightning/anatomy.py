"""Classifies the parameters of a model: weights that multiply, embeddings, output layers, adapters, and the rest."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from elsa_lightning.errors import UserError
from elsa_lightning.layout.fsdp1 import check_separate
from elsa_lightning.layout.kernels import mark_kernel, mark_transposed, matrix_shape
from elsa_lightning.layout.sharded import clean, part_of

_HEAD = re.compile(
    r"(aux_|cls_|lm_|classification_|detection_)?heads?(_\w+)?|(?!pre_)(\w+_)?classifier|score|qa_outputs|logits"
)
_LAST_HEAD = re.compile(  # counts if only other heads come after it
    rf"fc|(?!pre_|(\w+_)?(attn|attention|multi)_heads?$)\w+_heads?|{_HEAD.pattern}"
)
_ADAPTER = re.compile(r"(^|\.)lora_\w+")
_ADDED = re.compile(r"bias|emb|(^|[._])pos|position|token|norm", re.IGNORECASE)  # names of tensors that do not multiply
_EXPERTS = re.compile(r"experts?|moe", re.IGNORECASE)

_EXAMINED = weakref.WeakSet[nn.Module]()  # weak references to parameters would bar torch.utils.swap_tensors


@dataclass(frozen=True)
class Anatomy:
    """The parameters of a model by their role, under names without prefixes of wrappers.

    Attributes:
        parameters: All parameters by name, shared ones once.
        multiply: The weights that ``all-linear`` means, before exemptions.
        embeddings: Weights of embeddings, and of layers tied to them.
        heads: Weights and biases of output layers.
        taken: Weights of heads that the model does not declare, with how they were recognised: ``name`` or ``shape``.
        depthwise: Kernels with one input channel each.
        adapters: Parameters that LoRA and its kin add to frozen layers.
        computed: Parameters from which a parametrization such as weight_norm computes a weight, with the weight's name.
        vectors: Norms and biases, whatever their shape.
    """

    parameters: dict[str, nn.Parameter]
    multiply: set[str] = field(default_factory=set)
    embeddings: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    taken: dict[str, str] = field(default_factory=dict)
    depthwise: set[str] = field(default_factory=set)
    adapters: set[str] = field(default_factory=set)
    computed: dict[str, str] = field(default_factory=dict)
    vectors: set[str] = field(default_factory=set)

    @property
    def linear(self) -> set[str]:
        """What ``all-linear`` means."""
        return self.multiply - self.embeddings - self.heads - self.adapters - self.depthwise

    def matrices(self) -> Iterator[str]:
        """Yield parameters that multiply or may do so: all but vectors, tables and tensors that are added."""
        for name, p in self.parameters.items():
            shape = shape_of(p)
            broadcast = len(shape) > 2 and shape[0] == 1
            other = name in self.vectors or broadcast or _ADDED.search(name)
            if shape.numel() and (name in self.multiply or not other):
                yield name


def shape_of(p: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, a convolution's kernels as a matrix."""
    return matrix_shape(p, part_of(p).shape)


def examine(model: nn.Module) -> Anatomy:
    """Classify the parameters of a model, and mark those that are stored transposed.

    Raises:
        ValueError: Some parameters have no shape yet.
    """
    parameters = {clean(name): p for name, p in model.named_parameters()}
    if lazy := [name for name, p in parameters.items() if isinstance(p, nn.UninitializedParameter)]:
        raise UserError(f"{lazy[0]} has no shape yet (a lazy module): send one batch through the model first")
    check_separate(parameters)
    _EXAMINED.add(model)
    names = {id(p): name for name, p in parameters.items()}
    found = Anatomy(parameters)
    norms: set[str] = set()
    for path, module in model.named_modules():
        weights = list(_weights(module))
        found.multiply.update(names[id(p)] for _, p in weights if id(p) in names)
        if isinstance(module, nn.modules.conv._ConvNd):
            for _, p in weights:
                mark_kernel(p)
            if module.groups == module.in_channels > 1:
                found.depthwise.update(names[id(p)] for _, p in weights)
        if _is_transposed(module):
            for _, p in weights:
                mark_transposed(p)
        own = {names[id(p)] for p in module.parameters(recurse=False)}
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            found.embeddings.update(own)
        if "Norm" in type(module).__name__:
            norms |= own - found.multiply  # a NormedLinear's weight multiplies
        prefix = clean(f"{path}.") if path else ""
        found.adapters.update(_adapters(module, prefix, parameters))
        found.computed.update(_computed(module, prefix, parameters))
    found.adapters.update(name for name in parameters if _ADAPTER.search(name))
    found.vectors.update(
        name
        for name, p in parameters.items()
        if name in norms or len(shape_of(p)) < 2 or (name not in found.multiply and _is_vector(p))
    )
    _find_heads(model, names, found)
    return found


class Homes:
    """The models in which some parameters are, of those that were examined.

    Parameters can be replaced in a model, while an optimizer goes on with the former ones, which nothing trains.

    Args:
        parameters: The parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._names: list[tuple[weakref.ref[nn.Module], set[str]]] = []
        for model in _EXAMINED:
            there = {id(p) for p in model.parameters()}
            if names := {name for name, p in parameters.items() if id(p) in there}:
                self._names.append((weakref.ref(model), names))

    def left(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Return the names of parameters that are no longer in a model."""
        left: set[str] = set()
        for reference, names in self._names:
            if (model := reference()) is not None:
                there = {id(p) for p in model.parameters()}
                left.update(name for name in names & parameters.keys() if id(parameters[name]) not in there)
        return [name for name in parameters if name in left]


def _is_vector(p: nn.Parameter) -> bool:
    shape = shape_of(p)
    return shape.numel() == max(shape)


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield names and parameters directly in a module that multiply its input."""
    for name in _weight_names(module):
        p = module._parameters.get(name)  # getattr would compute a parametrized weight
        if p is not None:
            yield name, p


def _weight_names(module: nn.Module) -> list[str]:
    if isinstance(module, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)):
        return ["weight"]
    if is_conv1d(module):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        return ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight_")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    if _EXPERTS.search(type(module).__name__):  # fused: (experts, out, in)
        return [
            name for name, p in module.named_parameters(recurse=False)
            if len(part_of(p).shape) == 3 and part_of(p).shape[0] > 1 and not _ADDED.search(name)
        ]  # fmt: skip
    return []


def stacks(model: nn.Module) -> list[str]:
    """Return the names of stacks of matrices, such as fused experts, which are no layers of their own."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)  # whose kernels have three dimensions too
        for name, p in module.named_parameters(recurse=False)
        if p.dim() == 3 and p.shape[0] > 1 and not _ADDED.search(name)
    ]


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' linear layer that stores its weight (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # that of transformers, without importing it


def _is_transposed(module: nn.Module) -> bool:
    """Return whether weights are stored (in, out)."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.transposed
    experts = type(module).__name__ == "Llama4TextExperts" or getattr(module, "is_transposed", False) is True
    return is_conv1d(module) or (experts and bool(_EXPERTS.search(type(module).__name__)))


def _adapters(module: nn.Module, prefix: str, parameters: dict[str, nn.Parameter]) -> Iterator[str]:
    """Yield the parameters that PEFT added to a layer, as the layer declares them."""
    for attribute in getattr(module, "adapter_layer_names", ()):
        start = prefix + attribute
        yield from (name for name in parameters if name == start or name.startswith(f"{start}."))


def _computed(module: nn.Module, prefix: str, parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, str]]:
    """Yield parameters from which weights of a module are computed, with the names of these weights."""
    parametrized: Any = getattr(module, "parametrizations", {})
    for tensor in parametrized if isinstance(parametrized, nn.ModuleDict) else ():
        start = f"{prefix}parametrizations.{tensor}."
        yield from ((name, prefix + tensor) for name in parameters if name.startswith(start))
    for weight in _weight_names(module):  # by a hook: weight_g and weight_v, weight_orig
        if weight not in module._parameters:
            for name, _ in module.named_parameters(recurse=False):
                if name.startswith(f"{weight}_"):
                    yield prefix + name, prefix + weight


def _find_heads(model: nn.Module, names: dict[int, str], found: Anatomy) -> None:
    """Add output layers: those that the model declares, else those recognised by name or shape."""
    hugging_face = False
    for module in model.modules():
        for declare in ("get_output_embeddings", "get_classifier"):  # Hugging Face's and timm's
            if not callable(getattr(module, declare, None)):
                continue
            hugging_face |= declare == "get_output_embeddings"
            layers = getattr(module, declare)()
            for layer in layers if isinstance(layers, (tuple, list)) else [layers]:
                if isinstance(layer, nn.Module):
                    found.heads.update(names[id(p)] for p in layer.parameters() if id(p) in names)
    tables = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Embedding)}
    known = found.heads | found.embeddings
    free = {id(found.parameters[name]) for name in found.multiply - known if found.parameters[name].requires_grad}
    for layer, told in _heads(model, free, set() if hugging_face else tables):
        weights = {names[id(p)] for _, p in _weights(layer)} - known
        found.taken.update(dict.fromkeys(weights, told))
        found.heads.update(names[id(p)] for p in layer.parameters(recurse=False) if names[id(p)] not in known)


def _heads(module: nn.Module, weights: set[int], tables: set[tuple[int, ...]]) -> Iterator[tuple[nn.Module, str]]:
    """Yield layers at a model's end with a head's name or an embedding's shape, and by which they were recognised.

    The search descends into the last child with weights, repeatedly, but never into numbered ones: these are hidden
    layers.
    """
    children = [(name, c) for name, c in module.named_children() if any(id(p) in weights for p in c.parameters())]
    last, any_found = True, False
    for name, child in reversed(children):
        last = last and bool(_LAST_HEAD.fullmatch(name))
        if (_LAST_HEAD if last else _HEAD).fullmatch(name):
            any_found = True
            several = isinstance(child, (nn.ModuleList, nn.ModuleDict))
            for one in child.children() if several else [child]:
                layers = [m for m in one.modules() if any(id(p) in weights for _, p in _weights(m))]
                yield from ((layer, "name") for layer in layers[-1:])
    if any_found or not children:
        return
    name, child = children[-1]
    if re.search(r"\d$", name):
        return
    shape = tuple(child.weight.shape) if isinstance(child, nn.Linear) else ()
    if shape in tables and len(set(shape)) > 1:
        yield child, "shape"
    yield from _heads(child, weights, tables)

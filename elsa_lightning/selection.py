"""Which parameters are constrained, and how much of the model that covers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from elsa_lightning.errors import UserError
from elsa_lightning.layout.fsdp1 import mark_slices, settle
from elsa_lightning.layout.sharded import clean, local, part_of, parts_of, processes_of

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Selection:
    """The constrained parameters of a model and what they leave out.

    Attributes:
        parameters: Constrained parameters by name.
        total: Elements of all parameters, shared ones counted once.
        exempt: Elements of embeddings, the LM head and what ``ignore`` names: dense by intent.
        head: Name of a layer that was taken for the head by its shape, where the model does not say which it is.
        left_out: Elements by name of matrices that are dense though nobody said so.
    """

    parameters: dict[str, nn.Parameter]
    total: int
    exempt: int
    left_out: dict[str, int]
    head: str | None = None

    @property
    def constrained(self) -> int:
        """Elements of the constrained parameters."""
        return sum(_size(p) for p in self.parameters.values())

    def summary(self) -> str:
        """Return one line for the log: how much is constrained."""
        share = self.constrained / max(self.total, 1)
        return (
            f"{len(self.parameters)} tensors constrained: {self.constrained:,} of {self.total:,} parameters "
            f"({share:.1%}); embeddings, LM head and ignored: {self.exempt:,} dense"
            + (f"; taken for the head by its shape: {self.head}" if self.head else "")
        )

    def warning(self, tolerated: float = 0.1) -> str | None:
        """Return what to tell a user whose model is covered less than they may think, or None.

        Args:
            tolerated: Share of the matrices that may be left out silently.
        """
        left_out = sum(self.left_out.values())
        if left_out <= tolerated * (left_out + self.constrained):
            return None
        groups: dict[str, int] = {}
        for name, size in self.left_out.items():
            group = re.sub(r"\d+", "*", name)
            groups[group] = groups.get(group, 0) + size
        largest = sorted(groups.items(), key=lambda item: -item[1])[:5]
        names = "\n".join(f"    {group}  ({size:,} parameters)" for group, size in largest)
        worth = [_pattern(group) for group, size in largest if size >= tolerated * left_out]  # no router, say
        targets = [f"'{pattern}'" for pattern in (ALL_LINEAR, *worth)]
        return (
            f"LOW COVERAGE: {left_out:,} of the {left_out + self.constrained:,} parameters in matrices are NOT "
            f"constrained and stay dense. The largest:\n{names}\n  Constrain them by name, for example "
            f"targets=[{', '.join(targets)}], or list them in ignore to say that dense is meant. Frozen ones "
            f"(requires_grad False) are never constrained: nothing would train what is left of them."
        )


def _pattern(group: str) -> str:
    return re.sub(r"(\\\*)+", r"\\d+", re.escape(group)) + "$"


def select(model: nn.Module, targets: Sequence[str] = (ALL_LINEAR,), ignore: Sequence[str] = ()) -> Selection:
    """Choose the parameters to constrain.

    Args:
        model: Any module.
        targets: What to constrain. ``"all-linear"`` means the weight of every ``nn.Linear`` and Hugging Face
            ``Conv1D`` except the LM head (tied to the embedding or not); anything else is a regular expression
            searched for in the parameter names.
        ignore: Regular expressions of parameter names to leave dense, stronger than ``targets``.

    Raises:
        ValueError: A pattern is no regular expression or matches nothing, or nothing is left to constrain.
    """
    names = {clean(name): p for name, p in model.named_parameters()}
    heads, guess = _embeddings_and_heads(model)
    matched: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            linear = _linear_weights(model) - heads
            matched |= {name for name, p in names.items() if id(p) in linear}
        else:
            matched |= _search("targets", target, names)
    ignored: set[str] = set().union(*(_search("ignore", pattern, names) for pattern in ignore))
    matched -= ignored
    chosen = {name: p for name, p in names.items() if name in matched and p.requires_grad}
    if not chosen:
        raise UserError(
            f"nothing to constrain: targets={list(targets)} and ignore={list(ignore)} select none of the model's "
            f"{len(names)} parameters that are trained; '{ALL_LINEAR}' needs nn.Linear or Conv1D layers, other models "
            f"need name patterns, and frozen parameters (requires_grad False) need to be trained"
        )
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    if convolutions := [name for name, p in chosen.items() if id(p) in kernels]:
        raise UserError(
            f"targets select {convolutions[0]!r}, a convolution's kernels, which are no matrices: leave it out"
        )
    if vectors := [name for name, p in chosen.items() if len(part_of(p).shape) < 2]:
        raise UserError(
            f"targets select {vectors[0]!r}, which is no matrix (shape {tuple(part_of(chosen[vectors[0]]).shape)}); "
            f"norms and biases stay dense: make the pattern more specific, for example 'proj.*weight'"
        )
    exempt = {name for name, p in names.items() if id(p) in heads or name in ignored} - chosen.keys()
    return Selection(
        parameters=chosen,
        total=sum(_size(p) for p in names.values()),
        exempt=sum(_size(names[name]) for name in exempt),
        left_out={
            n: _size(p) for n, p in names.items()
            if len(part_of(p).shape) > 1 and n not in chosen and n not in exempt
        },
        head=guess,
    )  # fmt: skip


def _size(p: nn.Parameter) -> int:
    return part_of(p).shape.numel()


def _search(argument: str, pattern: str, names: dict[str, nn.Parameter]) -> set[str]:
    try:
        found = {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise UserError(f"{argument}: {pattern!r} is no regular expression: {error}") from None
    if not found:
        example = ", ".join(list(names)[:3])
        raise UserError(f"{argument}: {pattern!r} matches no parameter of the model; names look like {example}")
    return found


def _linear_weights(model: nn.Module) -> set[int]:
    """Return the ids of the weights of Linear layers."""
    return {
        id(module.weight)
        for module in model.modules()
        # transformers' Conv1D is recognised by name, so that transformers is not imported for it
        if isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))
    }


def _embeddings_and_heads(model: nn.Module) -> tuple[set[int], str | None]:
    """Return the ids of the parameters of embeddings and output layers, and the name of one that is a guess.

    Hugging Face models name their output layer. Elsewhere the one Linear of an embedding's shape is taken for it; where
    several have that shape they are hidden layers.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    found = {id(module.weight) for module in embeddings}
    hugging_face = False
    for module in model.modules():
        output = getattr(module, "get_output_embeddings", None)
        if callable(output):
            hugging_face = True
            head = output()
            if isinstance(head, nn.Module):
                found |= {id(p) for p in head.parameters()}
    if hugging_face:
        return found, None
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for size, width in sorted({(e.num_embeddings, e.embedding_dim) for e in embeddings}, reverse=True):
        alike = [name for name, module in linear.items() if (module.out_features, module.in_features) == (size, width)]
        if len(alike) == 1:
            head_layer = linear[alike[0]]
            guess = None if id(head_layer.weight) in found else clean(alike[0])  # tied to the embedding: no guess
            return found | {id(p) for p in head_layer.parameters()}, guess
    return found, None


def count_zeros(model: nn.Module) -> tuple[int, int]:
    """Return (zeros, elements) of the weights that ``all-linear`` means, over all processes."""
    settle(model)
    mark_slices(model)
    parameters = select(model).parameters.values()
    processes = processes_of(parameters)
    parts = parts_of(parameters, processes)
    zeros = sum(int((local(p) == 0).sum()) for p, part in parts.items() if part.counts)
    if processes.groups:
        zeros = int(processes.add(torch.tensor(zeros, device=next(iter(parts)).device)))
    return zeros, sum(part.shape.numel() for part in parts.values())

"""The sets to which weights can be constrained, such as N:M or whole neurons, one a file."""

from elsa_lightning.sets.base import Constraint, Point, Points
from elsa_lightning.sets.block import Block
from elsa_lightning.sets.by_pattern import ByPattern
from elsa_lightning.sets.experts import Experts
from elsa_lightning.sets.nm import NM
from elsa_lightning.sets.quantized import Quantized
from elsa_lightning.sets.structured import Heads, Layers, Neurons, Width
from elsa_lightning.sets.tied import Member, Tie, Tied
from elsa_lightning.sets.unstructured import Unstructured

__all__ = [
    "NM", "Block", "ByPattern", "Constraint", "Experts", "Heads", "Layers", "Member", "Neurons", "Point", "Points",
    "Quantized", "Tie", "Tied", "Unstructured", "Width",
]  # fmt: skip

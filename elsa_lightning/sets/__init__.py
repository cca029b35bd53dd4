"""What weights are constrained to, one set a file."""

from elsa_lightning.sets.base import Constraint, Point, Points
from elsa_lightning.sets.tied import Member, Tie, Tied
from elsa_lightning.sets.unstructured import Unstructured

__all__ = ["Constraint", "Member", "Point", "Points", "Tie", "Tied", "Unstructured"]

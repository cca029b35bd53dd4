"""The forms of the x-update.

A form is one object behind :class:`Form`; :class:`elsa_lightning.ADMM` calls it and knows nothing of which it is. Two
kinds: the weights approach the set (``coupled``, ``published``, ``decoupled``; s = z − u is kept), or lie on it after
every step (``linearized``, ``feedback``; −u is kept). ``docs/method.md`` derives the default.
"""

from __future__ import annotations

from typing import Literal, get_args

from elsa_lightning.errors import UserError
from elsa_lightning.forms.base import Form, Step, Sums
from elsa_lightning.forms.on_set import Feedback, Linearized, OnSet
from elsa_lightning.forms.pull import Coupled, Decoupled, Published

__all__ = ["Form", "OnSet", "Prox", "Step", "Sums", "make_form"]

Prox = Literal["linearized", "decoupled", "coupled", "published", "feedback"]

_FORMS: dict[str, type[Form]] = {form.name: form for form in (Linearized, Decoupled, Coupled, Published, Feedback)}


def make_form(prox: str | Form) -> Form:
    """Return the form that a user's word names, or the user's own; raise ValueError if there is none."""
    if isinstance(prox, Form):
        return prox
    if prox not in _FORMS:
        raise UserError(f"prox must be one of {get_args(Prox)}, got {prox!r}")
    return _FORMS[prox]()

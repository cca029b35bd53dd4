"""The forms of the x-update: the variants of ADMM that the ``prox`` argument selects.

A form is an object that implements :class:`Form`; :class:`elsa_lightning.ADMM` calls it without knowing which it is.
There are two kinds: the weights approach the set (``coupled``, ``published``, ``decoupled``; s = z − u is stored), or
lie on it after every step (``linearized``, ``feedback``; −u is stored). ``docs/method.md`` derives the default.
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
    """Return the form of this name, or a form object as it is; raise ValueError for an unknown name."""
    if isinstance(prox, Form):
        return prox
    if prox not in _FORMS:
        raise UserError(f"prox must be one of {get_args(Prox)}, got {prox!r}")
    return _FORMS[prox]()

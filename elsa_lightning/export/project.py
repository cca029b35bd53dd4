"""Projects a checkpoint that was saved before its run had fixed the mask, exactly as the run itself would."""

from __future__ import annotations

import ast
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from elsa_lightning import sets
from elsa_lightning.admm import ADMM
from elsa_lightning.errors import UserError
from elsa_lightning.layout.sharded import clean
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import select


@torch.no_grad()
def project(model: nn.Module, state: dict[str, Any], optimizer_state: dict[str, Any]) -> None:
    """Project a model's weights onto the set of its run, weighted by the optimizer's second moment.

    Args:
        model: A Hugging Face model with the checkpoint's weights.
        state: The checkpoint's state of ADMM.
        optimizer_state: The checkpoint's state of the optimizer.

    Raises:
        UserError: The set cannot be read from its name, or the optimizer's state is not that of the model.
    """
    settings = state["settings"]
    module = nn.ModuleDict({"model": model})  # names as in the run's module
    select(module, quiet=True)  # marks transposed weights
    by_name = {clean(name): p for name, p in module.named_parameters()}
    names = [
        described.removesuffix(" channels_last").rpartition("(")[0] for described in settings["constrained tensors"]
    ]
    if missing := [name for name in names if name not in by_name]:
        raise UserError(f"the checkpoint constrains {missing[0]}, which the model does not have: give --model")
    trained = list(by_name.values())
    optimizer = torch.optim.SGD(trained, lr=0.0)  # makes no step: it only holds the state
    for key, entry in optimizer_state["state"].items():
        p = trained[key] if isinstance(key, int) else by_name[clean(key)]
        if any(t.shape != p.shape for name, t in entry.items() if name in ("exp_avg", "exp_avg_sq")):
            raise UserError("the checkpoint's optimizer does not train the model's parameters in their order")
        optimizer.state[p] = dict(entry)
    shape = {f.name: settings[f.name] for f in fields(Schedule) if f.name in settings}
    order = {name: by_name[name] for name in by_name if name in set(names)}
    admm = ADMM(
        optimizer,
        order,
        read_set(settings["constraint"]).fitted(module),
        total_steps=state["total_steps"],
        schedule=Schedule(**shape),
        prox=settings["prox"],
        state_dtype=settings["state_dtype"],
    )
    admm.load_state_dict(state)
    admm.finish(resumable=True)  # resumable, so that it does not warn of missing steps
    admm.detach()


def read_set(text: str) -> sets.Constraint:
    """Return the set whose ``repr`` is given; nothing but sets of this library and literals is evaluated.

    Raises:
        UserError: The text does not name a set of the library.
    """
    try:
        made = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError, AttributeError) as error:
        made = error
    if not isinstance(made, sets.Constraint):
        raise UserError(
            f"the checkpoint's set {text!r} is none that can be made from its name: finish the run, and export its hf "
            f"folder"
        )
    return made


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in sets.__all__:
        made = getattr(sets, node.func.id)
        named = {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}
        return made(*(_value(argument) for argument in node.args), **named)
    if isinstance(node, ast.Dict):
        keys = [None if key is None else ast.literal_eval(key) for key in node.keys]
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_value(element) for element in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    return ast.literal_eval(node)

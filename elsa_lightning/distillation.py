"""Distillation from a dense model: losses on its distribution and features, in memory independent of the classes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from elsa_lightning.errors import UserError
from elsa_lightning.layout.precise import precise_buffers

__all__ = ["DenseTeacher", "Distilled", "distillation_loss", "feature_distance"]
Head = Callable[[Tensor], Tensor]
LOGITS_AT_ONCE = 2**25  # 128 MiB of float32, and a few copies of it
IGNORED = -100  # label of positions that are not scored, as in torch


class Distilled(NamedTuple):
    """Means over the scored positions, in nats: the training loss, and the detached losses from which it is mixed."""

    loss: Tensor
    by_labels: Tensor
    by_teacher: Tensor


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    head: Head | None = None,
    teacher_head: Head | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Distilled:
    """Return (1 - weight) · cross-entropy with the labels + weight · T² · cross-entropy with the teacher, at T.

    The cross-entropy with the teacher is the Kullback-Leibler divergence plus the teacher's entropy, which has no
    gradient; T² keeps the gradient's size. Logits are computed for some positions at a time, and again in the backward
    pass, so that no tensor has positions × classes entries; if all fit at once, nothing is computed twice.

    Args:
        student: The input of ``head``, ``(..., width)``; without a head logits, ``(..., classes)``.
        teacher: The same for the teacher, at the same positions. It gets no gradient.
        labels: Class of each position ``(...)``, -100 where it is not scored. None scores all by the teacher alone.
        weight: Weight of the teacher, from 0 to 1.
        temperature: T, which divides the logits of both in the second term.
        head: Maps ``(n, width)`` to ``(n, classes)``, such as the last linear layer.
        teacher_head: The teacher's own head.
        logits_at_once: Positions × classes of a chunk.

    Raises:
        UserError: A number is out of range, or shapes do not match.
    """
    _check(student, teacher, labels, weight, temperature, logits_at_once)
    x, y = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    targets = x.new_zeros(len(x), dtype=torch.long) if labels is None else labels.flatten()

    def chunk(x: Tensor, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = _precise(x if head is None else head(x))
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight < 1):
            by_labels = logits.new_zeros(()) if labels is None else F.cross_entropy(logits, targets, reduction="sum")
        if weight == 0:
            return by_labels, torch.zeros_like(by_labels)
        with torch.no_grad():
            wanted = _precise(y if teacher_head is None else teacher_head(y))
            if wanted.shape != logits.shape:
                raise UserError(f"the student has {logits.shape[1]} classes and the teacher {wanted.shape[1]}")
            wanted = (wanted / temperature).softmax(dim=-1)
        by_teacher = F.cross_entropy(logits / temperature, wanted, reduction="none")
        return by_labels, temperature**2 * (by_teacher * (targets != IGNORED)).sum()

    size = max(1, logits_at_once // max(1, _classes(x, head)))
    if len(x) <= size:
        parts = [chunk(x, y, targets)]
    else:
        places = [slice(start, start + size) for start in range(0, len(x), size)]
        parts = [checkpoint(chunk, x[at], y[at], targets[at], use_reentrant=False) for at in places]
    scored = (targets != IGNORED).sum()
    by_labels, by_teacher = (torch.stack(each).sum() / scored for each in zip(*parts, strict=True))
    mixed = [share * loss for share, loss in ((1 - weight, by_labels), (weight, by_teacher)) if share > 0]
    return Distilled(sum(mixed[1:], mixed[0]), by_labels.detach(), by_teacher.detach())


def feature_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], kept: Tensor | None = None) -> Tensor:
    """Return the mean over layers and positions of ‖student - teacher‖² / ‖teacher‖².

    This is SquareHead (arXiv:2310.06927) applied position by position, so that a few large positions do not hide the
    others, and the mean does not depend on how a batch is split over processes.

    Args:
        student: Output of each layer, ``(..., width)``.
        teacher: The same for the teacher. It gets no gradient.
        kept: Positions that count, ``(...)``, such as an attention mask. None counts all.

    Raises:
        UserError: Numbers of layers, or widths, differ.
    """
    shapes = [[tuple(t.shape) for t in features] for features in (student, teacher)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise UserError(
            f"features are compared layer by layer, and the student's have shapes {shapes[0]}, the teacher's "
            f"{shapes[1]}: give as many of the same shapes"
        )
    return torch.stack(
        [checkpoint(_distance, s, t.detach(), kept, use_reentrant=False) for s, t in zip(student, teacher, strict=True)]
    ).mean()


def _distance(student: Tensor, teacher: Tensor, kept: Tensor | None) -> Tensor:
    student, teacher = _precise(student), _precise(teacher)
    size = teacher.square().sum(dim=-1)
    apart = (student - teacher).square().sum(dim=-1) / size.clamp_min(torch.finfo(size.dtype).tiny)
    return apart.mean() if kept is None else (apart * kept).sum() / kept.sum()


class DenseTeacher:
    """A frozen copy of a model, called like the model.

    It is not a module, so as an attribute it is not saved in checkpoints, not trained and not sharded. Create it where
    the dense model is created (``__init__``, or ``configure_model`` before anything is sharded): later, the model of a
    resumed run already has pruned weights.

    Args:
        model: The model; the copy is in evaluation mode, without gradients.
        dtype: The dtype of the copy, and of floating-point inputs. Computed buffers of transformers' models, such as
            frequencies of rotary embeddings, stay in float32, as ``from_pretrained`` leaves them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        if any(p.is_meta for p in model.parameters()):
            raise UserError("a teacher is copied from a model with weights, and this one is on the meta device")
        self.model = _cast(copy.deepcopy(model), dtype).eval().requires_grad_(False)
        self.dtype = dtype

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the copy's output, after moving the copy to the device of its first input tensor."""
        devices: list[torch.device] = []

        def own(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            devices.append(value.device)
            return value.to(self.dtype) if value.is_floating_point() else value

        args, kwargs = tree_map(own, (args, kwargs))
        if devices:
            self.model.to(devices[0])
        return self.model(*args, **kwargs)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model, but not the buffers that transformers' models compute in float32 whatever their dtype.

    Others' models may add such a buffer to their hidden states as it is, and so need all of them in one dtype.
    """
    transformers = sys.modules.get("transformers.modeling_utils")  # not loaded, it made none of the modules
    with ExitStack() as held:
        for module in model.modules():
            if transformers is not None and isinstance(module, transformers.PreTrainedModel):
                held.enter_context(precise_buffers(module))
        return model.to(dtype)


def _precise(t: Tensor) -> Tensor:
    return t.float() if t.itemsize < 4 else t


def _classes(x: Tensor, head: Head | None) -> int:
    if head is None:
        return x.shape[-1]
    if isinstance(head, nn.Linear):
        return head.out_features
    with torch.no_grad():
        return head(x[:1]).shape[-1]


def _check(
    student: Tensor, teacher: Tensor, labels: Tensor | None, weight: float, temperature: float, logits_at_once: int
) -> None:
    if not 0 <= weight <= 1:
        raise UserError(f"weight is the teacher's, from 0 to 1, got {weight}")
    if not temperature > 0:
        raise UserError(f"temperature is a number above 0, got {temperature}")
    if logits_at_once < 1:
        raise UserError(f"logits_at_once is a number of 1 or more, got {logits_at_once}")
    if labels is None and weight < 1:
        raise UserError(f"weight {weight} leaves a share to the labels, and there are none: give labels, or weight=1")
    places = [tuple(student.shape[:-1]), tuple(teacher.shape[:-1])] + ([] if labels is None else [tuple(labels.shape)])
    if student.dim() < 2 or len(set(places)) > 1:
        raise UserError(
            f"student, teacher and labels are of the same positions (...), with a last dimension of classes or width "
            f"for the first two; got {tuple(student.shape)}, {tuple(teacher.shape)}"
            + ("" if labels is None else f" and {tuple(labels.shape)}")
        )

"""Distillation of causal language models: a pruned model learns from the dense model that it was, or from a teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from elsa_lightning.distillation import LOGITS_AT_ONCE, Distilled, Head, distillation_loss, feature_distance
from elsa_lightning.layout.precise import evaluating


class BeforeHead:
    """A hook on a model's head: keeps the head's input, and lets the head compute the first position alone.

    Args:
        scale: If given, the head computes all positions, with its input multiplied by this.
    """

    def __init__(self, scale: float | None = None) -> None:
        self.scale = scale
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments that the head gets instead."""
        shown = args[0][:, :1] if self.scale is None else args[0] * self.scale
        self.seen.append(args[0] if self.scale is None else shown)
        return (shown, *args[1:])

    def run(self, model: Any, **inputs: Any) -> tuple[Any, Tensor, Head | None]:
        """Return the model's output, the input of its head, and the head; or logits and None if no head was called."""
        head = model.get_output_embeddings()
        self.seen.clear()
        handle = head.register_forward_pre_hook(self)
        try:
            output = model(**inputs, use_cache=False)
        finally:
            handle.remove()
        return (output, self.seen.pop(), head) if self.seen else (output, output.logits, None)


class Distillation:
    """The loss of a model that learns from a teacher, such as its dense original.

    Both models run up to their heads, which are then applied to some positions at a time. If a model's logits are not
    simply its head's output (capped, scaled), or the student's loss is not their cross-entropy alone, all logits are
    computed at once. What the student adds to the cross-entropy, such as the loss of a mixture's routers, stays whole.

    Args:
        teacher: The frozen dense model, on the right device; it may be sharded.
        weight: Weight of the teacher's distribution, against the text's next token.
        features: Weight of the distance from the outputs of the teacher's blocks, which is added.
    """

    logits_at_once = LOGITS_AT_ONCE

    def __init__(self, teacher: Any, weight: float, features: float) -> None:
        self.teacher, self.weight, self.features = teacher, weight, features
        self._hooks = BeforeHead(), BeforeHead()
        self._teachers, _ = _asked(teacher)
        self._students: tuple[bool, bool] | None = None

    def chunked(self, student: Any) -> bool:
        """Return whether both models' logits are made of some positions at a time; the student is asked once."""
        if self._students is None:
            self._students = its_head, adds = _asked(student)
            whose = None if self._teachers else "the teacher's are more than its head's"
            whose = whose if its_head else "the student's are more than its head's"
            whose = "the student's loss has more than their cross-entropy, and keeps it" if adds else whose
            if whose is not None:
                rank_zero_info(f"distillation makes the logits of a batch at once: {whose}")
        its_head, adds = self._students
        return self._teachers and its_head and not adds

    def __call__(self, student: Any, inputs: dict[str, Tensor]) -> Distilled:
        """Return the losses of a batch.

        Args:
            student: The model that is trained.
            inputs: Its inputs, including ``labels``.
        """
        others = {key: value for key, value in inputs.items() if key != "labels"}
        options = {"output_hidden_states": self.features > 0}
        chunked = self.chunked(student)
        assert self._students is not None
        adds = self._students[1]
        if chunked:
            output, x, head = self._hooks[0].run(student, **others, **options)
        else:
            output = student(**(inputs if adds else others), **options, use_cache=False)
            x, head = output.logits, None
        with torch.no_grad():
            if chunked:
                wanted, y, teacher_head = self._hooks[1].run(self.teacher, **others, **options)
            else:
                wanted = self.teacher(**others, **options, use_cache=False)
                y, teacher_head = wanted.logits, None
        targets = inputs["labels"][:, 1:]
        found = distillation_loss(
            x[:, :-1], y[:, :-1], targets, weight=self.weight, head=head, teacher_head=teacher_head,
            logits_at_once=self.logits_at_once,
        )  # fmt: skip
        if adds:
            more = output.loss - F.cross_entropy(x[:, :-1].float().flatten(0, 1), targets.flatten())
            found = found._replace(loss=found.loss + more, by_labels=output.loss.detach())
        if self.features > 0:
            near = feature_distance(output.hidden_states[1:], wanted.hidden_states[1:], others.get("attention_mask"))
            found = found._replace(loss=found.loss + self.features * near)
        return found


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _asked(model: Any) -> tuple[bool, bool]:
    """Return whether a model's logits are its head's output, however large, and whether its loss has more than these.

    It is asked in evaluation mode, without dropout, which would draw random numbers and differ from call to call.
    """
    ids = (1 + torch.arange(8, device=model.device)[None]) % model.config.get_text_config().vocab_size
    with evaluating(model), torch.compiler.set_stance("force_eager"):  # else it would be compiled for this shape too
        output = model(input_ids=ids, labels=ids, use_cache=False)
        adds = not torch.allclose(output.loss.float(), F.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:]))
        if model.get_output_embeddings() is None:
            return False, adds
        large, x, head = BeforeHead(scale=1024.0).run(model, input_ids=ids)  # so large that a cap shows
    return head is not None and torch.equal(head(x), large.logits), adds

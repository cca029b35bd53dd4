"""Distillation: the plain formula and its gradients, whatever the chunks, without ever having all logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from elsa_lightning import ElsaCallback
from elsa_lightning.distillation import DenseTeacher, distillation_loss, feature_distance
from tests.callbacks.tiny import Net, every_step, load, loader, make_trainer

WIDTH, CLASSES = 6, 11


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, nn.Linear, nn.Linear]:
    """Hidden states of both, labels of which some are not scored, and heads."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 5, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
    labels = torch.randint(CLASSES, (3, 5)).index_put((torch.tensor([0, 2]), torch.tensor([1, 4])), torch.tensor(-100))
    return student, teacher, labels, *(nn.Linear(WIDTH, CLASSES, dtype=dtype) for _ in range(2))


def plain(s: Tensor, t: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """Return the loss of whole logits by its definition."""
    kept = labels != -100
    s, t, labels = s[kept], t[kept].detach(), labels[kept]
    hard = -s.log_softmax(-1).gather(1, labels[:, None]).mean()
    soft = -((t / temperature).softmax(-1) * (s / temperature).log_softmax(-1)).sum(-1).mean()
    return (1 - weight) * hard + weight * temperature**2 * soft


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("at_once", [10**6, 4 * CLASSES, 1])
def test_loss_and_gradients_are_those_of_the_plain_formula(weight: float, temperature: float, at_once: int) -> None:
    student, teacher, labels, head, other = problem()
    expected = plain(head(student), other(teacher), labels, weight, temperature)
    wanted = torch.autograd.grad(expected, [student, *head.parameters()])
    found = distillation_loss(
        student, teacher, labels, weight=weight, temperature=temperature, head=head, teacher_head=other,
        logits_at_once=at_once,
    )  # fmt: skip
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    for a, b in zip([student, *head.parameters()], wanted, strict=True):
        torch.testing.assert_close(a.grad, b)
    assert teacher.grad is None and all(p.grad is None for p in other.parameters())
    torch.testing.assert_close(found.by_labels, F.cross_entropy(head(student).flatten(0, 1), labels.flatten()).detach())
    assert not found.by_labels.requires_grad and not found.by_teacher.requires_grad
    whole = distillation_loss(
        head(student), other(teacher), labels, weight=weight, temperature=temperature, logits_at_once=at_once
    )
    torch.testing.assert_close(whole.loss, expected)
    assert torch.autograd.gradcheck(
        lambda x: (
            distillation_loss(x, teacher, labels, weight=weight, head=head, logits_at_once=4 * CLASSES).loss
            if weight == 0
            else distillation_loss(
                x, teacher, labels, weight=weight, head=head, teacher_head=other, logits_at_once=4 * CLASSES
            ).loss
        ),
        student,
    )


def test_without_labels_all_positions_count_and_a_model_learns_to_be_its_teacher() -> None:
    student, teacher, _, head, other = problem()
    everywhere = torch.zeros(3, 5, dtype=torch.long)
    found = distillation_loss(student, teacher, head=head, teacher_head=other)
    torch.testing.assert_close(found.loss, plain(head(student), other(teacher), everywhere, 1.0, 1.0))
    logits = other(teacher).detach()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    guess = torch.zeros_like(logits, requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = distillation_loss(guess, logits, temperature=2.0).loss
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(distillation_loss(guess, logits).loss, entropy, rtol=1e-5, atol=0)


class Largest(TorchDispatchMode):
    """The most entries that a tensor which is computed has."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), 0)
        return out


@pytest.mark.parametrize(("positions", "classes"), [(64, 1024), (256, 1024), (64, 8192)])
def test_no_tensor_has_positions_times_classes_entries_forward_or_backward(positions: int, classes: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(positions, 4, requires_grad=True), torch.randn(positions, 4)
    head, other = nn.Linear(4, classes), nn.Linear(4, classes)
    saved: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    at_once = 8 * classes
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        loss = distillation_loss(
            student, teacher, torch.zeros(positions, dtype=torch.long), weight=0.5, head=head, teacher_head=other,
            logits_at_once=at_once,
        ).loss  # fmt: skip
        kept = sum(saved.values())
        loss.backward()
    assert largest.entries <= at_once  # the heads' weights and their gradients have 4 · classes
    assert kept <= 8 * positions + 16, "between forward and backward nothing of the classes is kept"


def test_half_precision_is_scored_in_single() -> None:
    student, teacher, labels, head, other = problem(torch.bfloat16)
    found = distillation_loss(student, teacher, labels, weight=0.5, head=head, teacher_head=other)
    assert found.loss.dtype == torch.float32
    expected = plain(head(student).float(), other(teacher).float(), labels, 0.5, 1.0)
    torch.testing.assert_close(found.loss, expected)


def test_features_are_as_far_as_their_squares_say_and_padding_counts_nowhere() -> None:
    torch.manual_seed(0)
    student = [torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(3)]
    expected = torch.stack(
        [((s - t).square().sum(-1) / t.square().sum(-1)).mean() for s, t in zip(student, teacher, strict=True)]
    ).mean()
    found = feature_distance(student, teacher)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(a, b)
    kept = torch.ones(2, 4, dtype=torch.long)
    kept[:, 2:] = 0
    alone = feature_distance([s[:, :2] for s in student], [t[:, :2] for t in teacher])
    torch.testing.assert_close(feature_distance(student, teacher, kept), alone)
    assert feature_distance(teacher, teacher) == 0
    assert feature_distance([torch.zeros(1, 2)], [torch.zeros(1, 2)]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "from 0 to 1, got 1.5"),
        ({"weight": float("nan")}, "from 0 to 1, got nan"),
        ({"temperature": 0.0}, "above 0, got 0.0"),
        ({"logits_at_once": 0}, "1 or more, got 0"),
        ({"labels": None, "weight": 0.5}, "there are none: give labels, or weight=1"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"of the same positions .* got \(3, 7\), \(3, 7\) and \(4,\)"),
        ({"teacher": torch.zeros(3, 8)}, "the student has 7 classes and the teacher 8"),
        ({"teacher": torch.zeros(2, 7)}, r"of the same positions .* got \(3, 7\), \(2, 7\)"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"student": torch.zeros(3, 7), "teacher": torch.zeros(3, 7), "labels": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        distillation_loss(**(arguments | options))


def test_features_of_other_shapes_are_refused() -> None:
    for other in ([torch.zeros(2, 4)], [], [torch.zeros(2, 3)] * 2):
        with pytest.raises(ValueError, match="compared layer by layer"):
            feature_distance([torch.zeros(2, 3)], other)


class Distilled(Net):
    """Learns from what it was when it was made."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.teacher = DenseTeacher(self.layers, torch.float32)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        wanted = self.teacher(batch)
        self.seen.append(wanted)
        return distillation_loss(self.layers(batch), wanted, temperature=2.0).loss


def test_any_module_learns_from_its_dense_start_also_when_it_is_resumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Distilled()
    dense = {name: t.clone() for name, t in model.layers.state_dict().items()}
    names = dict(model.named_modules())
    assert not any("teacher" in name for name in [*names, *model.state_dict()])
    callback = ElsaCallback(0.9, interval=3, targets=["weight"])
    make_trainer(tmp_path, callback, every_step(tmp_path), max_steps=8).fit(model, loader())
    torch.manual_seed(0)
    again = Distilled()
    resumed = make_trainer(tmp_path, ElsaCallback(0.9, interval=3, targets=["weight"]), max_steps=8)
    resumed.fit(again, loader(), ckpt_path=tmp_path / "5.ckpt", weights_only=True)
    assert len(again.seen) == 3
    for a, b in zip(again.seen, model.seen[5:], strict=True):
        assert torch.equal(a, b)
    for name, t in again.teacher.model.state_dict().items():
        assert torch.equal(t, dense[name]) and not torch.equal(t, model.layers.state_dict()[name])
    assert not again.teacher.model.training and not any(p.requires_grad for p in again.teacher.model.parameters())
    whole = load(tmp_path / "8.ckpt")["state_dict"]
    for name, t in again.state_dict().items():
        assert torch.equal(t, whole[name])


def test_a_teacher_takes_what_the_model_takes_in_its_own_precision() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor, name: str) -> dict[str, Tensor]:
            return {name: self.inner(pair[0])[pair[1]] * scale}

    model = Takes()
    teacher = DenseTeacher(model)
    x, at = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2])
    out = teacher((x, at), scale=torch.ones(2), name="y")["y"]
    assert out.dtype == torch.bfloat16 and not out.requires_grad
    torch.testing.assert_close(out.float(), model.inner(x)[at], rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="on the meta device"):
        DenseTeacher(nn.Linear(2, 2, device="meta"))


def test_a_teacher_is_as_from_pretrained_loads_it(tiny_llama: str) -> None:
    """Frequencies of rotary embeddings that are rounded to bfloat16 turn far positions by wrong angles."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
            self.register_buffer("added", torch.rand(3), persistent=False)

    teacher = DenseTeacher(model := Positions()).model
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    ids = torch.arange(32)[None]
    assert torch.equal(teacher.language(input_ids=ids).logits, loaded(input_ids=ids).logits)
    frequencies = model.language.model.rotary_emb.inv_freq
    assert torch.equal(teacher.language.model.rotary_emb.inv_freq, frequencies)
    assert teacher.added.dtype == torch.bfloat16  # of a module that is not transformers' own

"""F̂ of few batches: what it is held towards, and that this says more of the loss than the batches alone."""

import pytest
import torch
from torch import Tensor, nn

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.fisher import steadied
from elsa_lightning.layout import rows
from elsa_lightning.layout.sharded import Processes
from elsa_lightning.stacks import Stack, together


def stepped(p: nn.Parameter, grad: Tensor, **options: object) -> ADMM:
    """Return an ADMM of one parameter after a step with this gradient."""
    optimizer = torch.optim.Adam([p], lr=1e-3)
    admm = ADMM(optimizer, {"p": p}, Unstructured(0.5), total_steps=10, **options)  # type: ignore[arg-type]
    p.grad = grad
    optimizer.step()
    return admm


@pytest.mark.parametrize("shape", [(12, 20), (6, 5, 3, 3), (3, 8, 10)], ids=["linear", "kernel", "experts"])
@pytest.mark.parametrize("limit", [16, 1 << 18], ids=["pieces", "whole"])
def test_it_is_held_towards_the_product_of_its_means(
    shape: tuple[int, ...], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "PIECE_ON_CPU", limit)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    admm = stepped(p, torch.randn(shape))
    (tensor,) = admm.tensors.values()
    with steadied([tensor], Processes(), 0.25):
        found = torch.cat([tensor.importance(piece.rows) for piece in tensor.pieces()])  # type: ignore[misc]
    plain = torch.cat([tensor.importance(piece.rows) for piece in tensor.pieces()])  # type: ignore[misc]
    moment = admm.optimizer.state[p]["exp_avg_sq"].reshape(plain.shape)
    product = torch.outer(moment.mean(dim=1), moment.mean(dim=0)) / moment.mean()
    torch.testing.assert_close(found, 0.75 * moment + 0.25 * product)
    assert torch.equal(plain, moment)


def test_small_tensors_are_held_each_by_itself_although_they_are_handled_together() -> None:
    torch.manual_seed(0)
    named = {name: nn.Parameter(torch.randn(6, 10)) for name in "abcd"} | {"e": nn.Parameter(torch.randn(4, 10))}
    optimizer = torch.optim.Adam(named.values(), lr=1e-3)
    admm = ADMM(optimizer, named, Unstructured(0.5), total_steps=10)
    for name, scale in zip("abce", (0.0, 1.0, 10.0, 1.0), strict=True):  # d has no moment yet
        named[name].grad = torch.randn_like(named[name]) * scale
    optimizer.step()
    tensors = list(admm.tensors.values())
    with steadied(tensors, Processes(), 0.25):
        alone = {tensor.name: tensor.importance(slice(0, tensor.layout.count)) for tensor in tensors}
        stacks = [tensor for _, tensor in together(enumerate(tensors)) if isinstance(tensor, Stack)]
        stacked = [stack.importance(slice(None)) for stack in stacks]
    for name in "bce":
        moment = optimizer.state[named[name]]["exp_avg_sq"]
        product = torch.outer(moment.mean(dim=1), moment.mean(dim=0)) / moment.mean()
        torch.testing.assert_close(alone[name], 0.75 * moment + 0.25 * product)
    assert alone["d"] is None
    members = [[member.name for member in stack.members] for stack in stacks]
    assert members == [["a", "b", "c"]], "these have the same shape and state"
    for names, found in zip(members, stacked, strict=True):
        assert found is not None
        assert torch.equal(found, torch.cat([alone[name] for name in names]))  # type: ignore[misc]


@pytest.mark.parametrize("prox", ["linearized", "feedback", "published"])
def test_without_any_gradient_yet_the_largest_weights_are_kept(prox: str) -> None:
    """As at the dense start of distillation from an equal model in bfloat16, whose gradient is exactly 0."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(16, 16))
    largest = p.detach().abs() >= p.detach().abs().flatten().sort().values[128]
    admm = stepped(p, torch.zeros(16, 16), prox=prox)
    assert torch.equal(admm.masks()["p"], largest)


def test_one_batch_held_predicts_the_squares_of_other_batches_better() -> None:
    torch.manual_seed(0)
    scales, errors = torch.rand(64) * 4 + 0.1, torch.rand(48) * 4 + 0.1  # inputs and outputs of different sizes

    def gradient() -> Tensor:
        return (torch.randn(256, 48) * errors).T @ (torch.randn(256, 64) * scales)

    expected = torch.stack([gradient().square() for _ in range(200)]).mean(dim=0).log()
    p = nn.Parameter(torch.randn(48, 64))
    admm = stepped(p, gradient())
    (tensor,) = admm.tensors.values()
    everything = slice(0, 48)
    plain = tensor.importance(everything)
    with steadied([tensor], Processes(), 8 / 9):
        held = tensor.importance(everything)
    assert plain is not None and held is not None
    apart = [(t.log() - t.log().mean() - expected + expected.mean()).square().mean() for t in (plain, held)]
    assert apart[1] < apart[0] / 10


def test_its_weight_fades_and_nothing_of_it_stays() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(12, 20))
    admm = stepped(p, torch.randn(12, 20))
    (tensor,) = admm.tensors.values()
    everything = slice(0, 12)
    first = tensor.importance(everything)
    seen = []
    for step in (1, 8, 1000):
        admm.step = step
        with admm._steadied([tensor]):
            held = tensor.importance(everything)
        assert first is not None and held is not None
        seen.append(float((held - first).norm()))
    assert seen[0] > seen[1] > seen[2] == 0
    assert seen[0] / seen[1] == pytest.approx((8 / 9) / (8 / 16), rel=1e-4)

"""2:4 on a GPU: which layers qualify, and what is refused; the product itself needs a GPU."""

import copy

import pytest
import torch
from torch import nn

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.export import to_semi_structured, why_not_semi_structured


@torch.no_grad()
def two_of_four(layer: nn.Linear) -> nn.Linear:
    groups = layer.weight.view(-1, 4)
    layer.weight.copy_(groups.scatter(1, groups.abs().float().argsort(dim=1)[:, :2], 0).view_as(layer.weight))
    return layer


class Own(nn.Linear):
    """A layer of unknown kind that uses its weight in its own way."""


def model(dtype: torch.dtype = torch.float16) -> nn.Module:
    torch.manual_seed(0)
    made = nn.ModuleDict({
        "fits": two_of_four(nn.Linear(128, 64)),
        "sparser": two_of_four(nn.Linear(64, 32)),
        "narrow": two_of_four(nn.Linear(96, 64)),
        "short": two_of_four(nn.Linear(64, 40)),
        "anywhere": nn.Linear(64, 64),
        "embedding": nn.Embedding(32, 64),
        "head": two_of_four(nn.Linear(64, 32)),
        "own": two_of_four(Own(64, 32)),
    })  # fmt: skip
    with torch.no_grad():
        made["sparser"].weight[:, ::2] = 0  # type: ignore[index, operator]
        made["anywhere"].weight[:, 0] = 0  # type: ignore[index, operator]
    made["head"].weight = made["embedding"].weight
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_which_layers_qualify_and_why_others_do_not(dtype: torch.dtype) -> None:
    reasons = why_not_semi_structured(model(dtype))
    assert reasons.keys() == {"fits", "sparser", "narrow", "short", "anywhere", "head", "own"}
    assert reasons.pop("own") == "is of the class Own, whose products may be others than nn.Linear's"
    assert reasons["head"] == "shares its weight with another layer"
    if dtype == torch.float32:
        assert set(reasons.values()) == {
            "shares its weight with another layer",
            "is float32, and no float16 or bfloat16",
        }
        return
    assert reasons["fits"] is None and reasons["sparser"] is None
    assert reasons["narrow"] == "is 64×96, and no multiple of 32×64"
    assert reasons["short"] == "is 40×64, and no multiple of 32×64"
    assert str(reasons["anywhere"]).startswith("has more than two weights in ")


def test_what_qualifies_has_a_shape_that_both_of_torchs_kernels_take() -> None:
    layer = model()["fits"].weight  # type: ignore[index, union-attr]
    for kernel in (torch.sparse.SparseSemiStructuredTensorCUTLASS, torch.sparse.SparseSemiStructuredTensorCUSPARSELT):
        for dtype in (torch.float16, torch.bfloat16):
            least = kernel._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert 32 % least.sparse_min_rows == 0 and 64 % least.sparse_min_cols == 0
            assert layer.shape[0] % least.sparse_min_rows == 0 and layer.shape[1] % least.sparse_min_cols == 0


def test_a_cpu_is_refused_and_nothing_is_changed() -> None:
    made = model()
    before = {name: p.clone() for name, p in made.named_parameters()}
    with pytest.raises(UnavailableError, match=r"and the model is on cpu: move it there \(model.cuda\(\)\)"):
        to_semi_structured(made)
    assert all(torch.equal(p, before[name]) for name, p in made.named_parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_are_those_of_the_dense_layers() -> None:
    dense = model().cuda()
    sparse = to_semi_structured(copy.deepcopy(dense))
    for name, reason in why_not_semi_structured(dense).items():
        one, other = dense.get_submodule(name), sparse.get_submodule(name)
        assert (type(other.weight.data) is not torch.Tensor) == (reason is None)  # type: ignore[union-attr]
        for rows in (1, 8, 33):
            x = torch.randn(rows, one.in_features, device="cuda", dtype=torch.float16)  # type: ignore[arg-type, call-overload]
            assert torch.allclose(one(x), other(x), atol=1e-2, rtol=1e-2), name
    with pytest.raises(UserError, match="no linear layer can use 2:4 kernels"):
        to_semi_structured(model(torch.float32).cuda())

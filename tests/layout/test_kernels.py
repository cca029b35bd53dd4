"""Convolutions' kernels as matrices: exact zeros, the same run as the matrix's, and resuming to the bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.optim import Adam8bit as TheirAdam8bit
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout.kernels import as_kernel, as_matrix, mark_kernel
from elsa_lightning.optim.adam8bit import Adam8bit
from elsa_lightning.optim.moments import second_moment
from elsa_lightning.selection import count_zeros, select

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "their 8 bits": lambda params: TheirAdam8bit(params, lr=1e-2, min_8bit_size=256),
    "our 8 bits": lambda params: Adam8bit(params, lr=1e-2, min_8bit_size=256),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}
STEPS = 12
ROWS, LAST = torch.contiguous_format, torch.channels_last
PAIRS = [(name, order) for name in OPTIMIZERS for order in (ROWS, LAST) if (name, order) != ("their 8 bits", LAST)]


class Convolutions(nn.Module):
    """Every kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv1d(2, 12, 5, padding=2)
        self.square = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 12, 3, groups=2), nn.Tanh())
        self.up = nn.ConvTranspose2d(12, 4, 3)
        self.solid = nn.Conv3d(1, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.square(x))
        z = self.solid(y[:, None]).flatten(2).mean(-1)
        return y.square().mean() + z.square().mean() + self.flat(y[:, :2, 0]).square().mean()


def model(memory_format: torch.memory_format = ROWS, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    made = Convolutions().to(dtype)
    for layer in (made.square, made.up):
        layer.to(memory_format=memory_format)  # type: ignore[call-overload]
    return made


def attach(net: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> ADMM:
    return ADMM(optimizer, select(net).parameters, Unstructured(0.9, "tensor"), total_steps=STEPS, **options)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    dtype = next(net.parameters()).dtype
    net(torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)).backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "memory_format"), PAIRS)
def test_every_kind_of_kernel_ends_with_its_zeros_in_its_own_memory(
    name: str, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    net = model(memory_format, dtype)
    optimizer = OPTIMIZERS[name](net.parameters())
    admm = attach(net, optimizer, state_dtype="float8_e4m3fn" if dtype == torch.bfloat16 else "float32")
    places = {n: (p.data_ptr(), p.stride()) for n, p in net.named_parameters()}
    for seed in range(STEPS):
        step(net, optimizer, seed)
    admm.finish()
    assert len(admm.masks()) == 5
    for key, mask in admm.masks().items():
        p = net.get_parameter(key)
        assert int((p == 0).sum()) == round(0.9 * p.numel())
        assert mask.shape == p.shape and torch.equal(mask, p != 0)
        assert (p.data_ptr(), p.stride()) == places[key]
    assert admm.occupancy()[1][:, 3].tolist() == [p.shape[0] for p in select(net).parameters.values()]
    sizes = [mask.numel() for mask in admm.masks().values()]
    assert count_zeros(net) == (sum(round(0.9 * size) for size in sizes), sum(sizes))


@pytest.mark.parametrize("state_dtype", ["float32", "float8_e4m3fn"])
def test_a_kernel_is_pruned_as_the_matrix_that_it_is(state_dtype: Any) -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().reshape(8, 36).clone())
    target = torch.randn(8, 36)
    for p in (kernel, matrix):
        optimizer = torch.optim.Adam([p], lr=0.02)
        admm = ADMM(optimizer, {"p": p}, Unstructured(0.8), total_steps=20, state_dtype=state_dtype)
        for _ in range(20):
            optimizer.zero_grad()
            (p.view(8, 36) - target).square().sum().backward()
            optimizer.step()
        admm.finish()
    assert torch.equal(kernel.view(8, 36), matrix)


@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4, 3, 2), (6, 4, 2, 3, 2), (6, 1, 3, 3), (6, 4, 1, 1), (0, 4, 3, 3)])
@pytest.mark.parametrize("last", [True, False])
def test_the_view_is_of_the_same_memory_and_goes_back(shape: tuple[int, ...], last: bool) -> None:
    kernel = torch.arange(float(torch.Size(shape).numel())).view(shape)
    if last:
        kernel = kernel.movedim(1, -1).contiguous().movedim(-1, 1)
    rows = as_matrix(kernel)
    assert rows.shape == (shape[0], torch.Size(shape[1:]).numel()) and rows.data_ptr() == kernel.data_ptr()
    assert torch.equal(as_kernel(rows, kernel), kernel)
    assert torch.equal(rows.sum(1), kernel.flatten(1).sum(1))


@pytest.mark.parametrize(("name", "memory_format"), [pair for pair in PAIRS if pair[0] != "sgd"])
def test_the_second_moment_of_an_entry_is_beside_that_entry(name: str, memory_format: torch.memory_format) -> None:
    """Gradients whose squares tell the entries apart come back at the entries that had them."""
    p = nn.Parameter(torch.zeros(16, 8, 3, 3).to(memory_format=memory_format))
    optimizer = OPTIMIZERS[name]([p])
    grad = (1 + torch.arange(p.numel()) % 97).float().view(p.shape)
    for _ in range(2):
        p.grad = torch.empty_like(p).copy_(grad)
        optimizer.step()
    expected = as_matrix(torch.empty_like(p.detach()).copy_(grad)).square()
    found = torch.cat([second_moment(optimizer, p, slice(i, i + 5)) for i in (0, 5, 10)])  # type: ignore[misc]
    error = found / found.sum() - expected[:15] / expected[:15].sum()
    assert float(error.norm() / (expected[:15] / expected[:15].sum()).norm()) < (1e-5 if name == "adam" else 0.05)


@pytest.mark.parametrize(("name", "memory_format"), PAIRS)
def test_a_resumed_run_ends_as_the_uninterrupted_one_to_the_bit(
    name: str, memory_format: torch.memory_format, tmp_path: Path
) -> None:
    ends = []
    for stop in (None, 7, 11):
        net = model(memory_format)
        optimizer = OPTIMIZERS[name](net.parameters())
        admm = attach(net, optimizer)
        for seed in range(STEPS):
            if seed == stop:
                torch.save([net.state_dict(), optimizer.state_dict(), admm.state_dict()], tmp_path / "saved.pt")
                weights, theirs, ours = torch.load(tmp_path / "saved.pt", weights_only=True)
                net = model(memory_format)
                net.load_state_dict(weights)
                optimizer = OPTIMIZERS[name](net.parameters())
                admm = attach(net, optimizer)
                optimizer.load_state_dict(theirs)
                admm.load_state_dict(ours)
            step(net, optimizer, seed)
        admm.finish()
        ends.append(net.state_dict())
    for end in ends[1:]:
        assert all(torch.equal(p, end[key]) for key, p in ends[0].items())


def test_an_optimizer_that_lays_weights_out_anew_is_refused_with_what_to_do() -> None:
    net = model(LAST)
    with pytest.raises(ValueError, match=r"square\.0\.weight is channels_last, and Adam8bit of bitsandbytes"):
        attach(net, OPTIMIZERS["their 8 bits"](net.parameters()))


def test_another_memory_format_is_refused_where_it_would_mix_entries_up() -> None:
    net = model()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    admm = attach(net, optimizer)
    step(net, optimizer, 0)
    saved = admm.state_dict()
    other = model(LAST)
    with pytest.raises(ValueError, match=r"other settings(?s:.)*channels_last"):
        attach(other, OPTIMIZERS["adam"](other.parameters())).load_state_dict(saved)
    net.square.to(memory_format=LAST)  # type: ignore[union-attr, call-overload]
    with pytest.raises(ValueError, match=r"the memory format of square\.0\.weight was changed after pruning had begun"):
        step(net, optimizer, 1)


def test_a_gradient_of_another_memory_format_is_taken_as_it_is_meant() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(8, 4, 3, 3), torch.randn(10, 8, 4, 3, 3)
    ends = []
    for memory_format in (ROWS, LAST):
        p = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([p], lr=0.1)
        ADMM(optimizer, {"p": p}, Unstructured(0.8), total_steps=10, prox="coupled")
        for grad in grads:
            p.grad = grad.to(memory_format=memory_format, copy=True)
            optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@contextmanager
def one_process(folder: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_kernels_that_are_sharded_along_their_first_dimension_are_pruned_and_others_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start, ends = torch.randn(8, 4, 3, 3), []
    with one_process(tmp_path) as mesh:
        for placement in (None, Shard(0), Replicate(), Shard(1)):
            t = start.clone() if placement is None else distribute_tensor(start.clone(), mesh, [placement])
            p = nn.Parameter(t)
            optimizer = torch.optim.Adam([p], lr=0.1)
            if placement == Shard(1):
                with pytest.raises(ValueError, match="sharded along their first dimension if at all"):
                    ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=5)
                continue
            admm = ADMM(optimizer, {"p": p}, Unstructured(0.9), total_steps=5)
            for _ in range(5):
                optimizer.zero_grad()
                p.square().sum().backward()
                optimizer.step()
            assert optimizer.state[p]["elsa_mask"].shape == (8, 5)  # 36 bits a row
            admm.finish()
            ends.append(p.detach() if placement is None else p.full_tensor().detach())  # type: ignore[attr-defined]
        line = nn.Parameter(distribute_tensor(torch.randn(8, 4, 3), mesh, [Shard(1)]))
        mark_kernel(line)
        with pytest.raises(ValueError, match="sharded along another dimension than their first"):
            ADMM(torch.optim.Adam([line]), {"line": line}, Unstructured(0.9), total_steps=5)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert int((ends[0] == 0).sum()) == round(0.9 * 288)

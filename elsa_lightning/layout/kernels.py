"""A convolution's kernels ``(out, in, k, ...)`` seen as a matrix ``(out, in·k·...)``, in the same memory.

Those of a transposed convolution are ``(in, out, k, ...)``, and a matrix likewise. Entries of a row come in the order
in which they lie in memory: with ``channels_last`` that is ``(k, ..., in)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TRANSPOSED = "_elsa_transposed"  # attribute of a parameter that is stored (in, out)
_MARK = "_elsa_kernel"  # attribute of a parameter of three dimensions, which else is a stack of matrices


def mark_kernel(p: Tensor) -> None:
    """Tell a parameter that it holds a convolution's kernels, which in one dimension its shape does not say."""
    setattr(p, _MARK, True)


def mark_transposed(p: Tensor) -> None:
    """Tell a parameter that its rows are inputs, as those of GPT-2's Conv1D and of transposed convolutions are."""
    setattr(p, _TRANSPOSED, True)


def is_transposed(p: Tensor) -> bool:
    """Say whether a parameter is stored ``(in, out)``, as far as :func:`mark_transposed` was told."""
    return getattr(p, _TRANSPOSED, False)


def is_kernel(p: Tensor, shape: torch.Size) -> bool:
    """Say whether a parameter holds a convolution's kernels.

    Args:
        p: The parameter, which may be a flat slice.
        shape: Of the whole parameter.
    """
    return len(shape) > 3 or (len(shape) == 3 and getattr(p, _MARK, False))


def matrix_shape(p: Tensor, shape: torch.Size) -> torch.Size:
    """Return what a parameter is to a set: ``(out, in)``, or ``(experts, out, in)``."""
    return torch.Size((shape[0], math.prod(shape[1:]))) if is_kernel(p, shape) else shape


def channels_last(kernel: Tensor) -> bool:
    """Say whether the input channels of kernels lie next to each other in memory."""
    return not kernel.is_contiguous()


def lies_in_rows(kernel: Tensor) -> bool:
    """Say whether kernels can be seen as a matrix in the same memory."""
    return kernel.is_contiguous() or kernel.movedim(1, -1).is_contiguous()


def as_matrix(kernel: Tensor) -> Tensor:
    """Return kernels that :func:`lies_in_rows` as ``(out, n)``, in the same memory."""
    rows = kernel.movedim(1, -1) if channels_last(kernel) else kernel
    return rows.view(rows.shape[0], math.prod(rows.shape[1:]))


def as_kernel(matrix: Tensor, like: Tensor) -> Tensor:
    """Return ``(out, n)`` in the shape of the kernels that it was made from."""
    if not channels_last(like):
        return matrix.view(like.shape)
    return matrix.view(like.movedim(1, -1).shape).movedim(-1, 1)


def rows_of(p: Tensor, t: Tensor) -> Tensor:
    """Return local entries of a parameter, or of something in its shape, as a matrix if they are kernels.

    Args:
        p: The parameter.
        t: Local entries.
    """
    return as_matrix(t) if t.dim() == p.dim() and is_kernel(p, p.shape) else t

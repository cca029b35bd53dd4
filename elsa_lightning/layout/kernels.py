"""Views of a convolution's kernels ``(out, in, k, ...)`` as a matrix ``(out, in·k·...)``, without a copy.

Kernels of a transposed convolution, ``(in, out, k, ...)``, become a matrix with ``in`` rows. The entries of a row are
in the order of memory: with ``channels_last`` that is ``(k, ..., in)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TRANSPOSED = "_elsa_transposed"  # attribute of a parameter that is stored (in, out)
_MARK = "_elsa_kernel"  # attribute of a 3-dimensional parameter; without it that is a stack of matrices


def mark_kernel(p: Tensor) -> None:
    """Mark a parameter as a convolution's kernels, since the shape of 1-dimensional kernels does not tell."""
    setattr(p, _MARK, True)


def mark_transposed(p: Tensor) -> None:
    """Mark a parameter whose rows are inputs, as in GPT-2's Conv1D and in transposed convolutions."""
    setattr(p, _TRANSPOSED, True)


def is_transposed(p: Tensor) -> bool:
    """Return whether a parameter was marked as stored ``(in, out)`` by :func:`mark_transposed`."""
    return getattr(p, _TRANSPOSED, False)


def is_kernel(p: Tensor, shape: torch.Size) -> bool:
    """Return whether a parameter holds a convolution's kernels.

    Args:
        p: The parameter, which may be a flat slice.
        shape: Shape of the whole parameter.
    """
    return len(shape) > 3 or (len(shape) == 3 and getattr(p, _MARK, False))


def matrix_shape(p: Tensor, shape: torch.Size) -> torch.Size:
    """Return the shape in which a set sees a parameter: ``(out, in)``, or ``(experts, out, in)``."""
    return torch.Size((shape[0], math.prod(shape[1:]))) if is_kernel(p, shape) else shape


def channels_last(kernel: Tensor) -> bool:
    """Return whether the input channels of kernels lie next to each other in memory."""
    return not kernel.is_contiguous()


def lies_in_rows(kernel: Tensor) -> bool:
    """Return whether kernels can be viewed as a matrix without a copy."""
    return kernel.is_contiguous() or kernel.movedim(1, -1).is_contiguous()


def as_matrix(kernel: Tensor) -> Tensor:
    """Return a view ``(out, n)`` of kernels for which :func:`lies_in_rows` is True."""
    rows = kernel.movedim(1, -1) if channels_last(kernel) else kernel
    return rows.view(rows.shape[0], math.prod(rows.shape[1:]))


def as_kernel(matrix: Tensor, like: Tensor) -> Tensor:
    """Return a matrix ``(out, n)`` in the shape of the kernels ``like``; the inverse of :func:`as_matrix`."""
    if not channels_last(like):
        return matrix.view(like.shape)
    return matrix.view(like.movedim(1, -1).shape).movedim(-1, 1)


def rows_of(p: Tensor, t: Tensor) -> Tensor:
    """Return local entries of a parameter, or of a tensor in its shape, as a matrix if the parameter holds kernels.

    Args:
        p: The parameter.
        t: The local entries.
    """
    return as_matrix(t) if t.dim() == p.dim() and is_kernel(p, p.shape) else t

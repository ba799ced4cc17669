"""Tensors as the arguments of C++ kernels."""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

__all__ = ["DTYPES", "exact", "integers", "packed", "pointers"]

# What the kernels compute in, as the ends of their names.
DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def exact(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: float64 where one of the values has it, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Where tensors begin; nowhere for those that are left out."""
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


def integers(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(n) for n in numbers]


def packed(*numbers: int) -> bytes:
    """Many integers as one array of int64_t, which is handed over faster than one by one."""
    return struct.pack(f"{len(numbers)}q", *numbers)

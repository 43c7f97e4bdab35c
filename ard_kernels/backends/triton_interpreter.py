"""Makes Triton's interpreter round to bfloat16 as GPUs do.

Triton 3.6's interpreter cuts the low bits off where the hardware rounds to the nearest, ties to even: results
on the CPU would have up to twice the error of those on a GPU, all of it towards zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_any = interpreter._convert_float


def _convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    if (source, target) == (tl.bfloat16, tl.float32):
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if (source, target) == (tl.float32, tl.bfloat16) and rounding_mode is None:
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        # The addition would carry a NaN with few bits set into infinity.
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return _convert_any(values, source, target, rounding_mode)


def install() -> None:
    interpreter._convert_float = _convert_float

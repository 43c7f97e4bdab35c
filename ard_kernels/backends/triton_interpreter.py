"""Makes Triton's interpreter round to bfloat16 as GPUs do, and enter a device function at little cost.

Triton 3.6's interpreter cuts the low bits off where the hardware rounds to the nearest, ties to even: results
on the CPU would have up to twice the error of those on a GPU, all of it towards zero.

A launch replaces the members of triton.language by interpreted ones until it ends, and so does every call of
a device function inside it, although they are in place: a quarter of the time of small attention tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_any = interpreter._convert_float
_patch_any = interpreter._patch_lang
_in_place: set[str] = set()


def _convert_float(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    if (source, target) == (tl.bfloat16, tl.float32):
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if (source, target) == (tl.float32, tl.bfloat16) and rounding_mode is None:
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        # The addition would carry a NaN with few bits set into infinity.
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return _convert_any(values, source, target, rounding_mode)


def _patch_lang(fn: Any) -> Any:
    """The scope of a launch, or None for a device function whose modules are in place: nobody ends its scope.

    Functions of Triton's own library see triton.language.core and not triton.language.
    """
    modules = {lang.__name__ for lang in (tl, tl.core) if any(x is lang for x in fn.__globals__.values())}
    if modules and modules <= _in_place:
        return None
    scope = _patch_any(fn)
    if not _in_place:  # the launch, which ends its own
        restore = scope.restore

        def end() -> None:
            _in_place.clear()
            restore()

        scope.restore = end
    _in_place.update(modules)
    return scope


def install() -> None:
    interpreter._convert_float = _convert_float
    interpreter._patch_lang = _patch_lang

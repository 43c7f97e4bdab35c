"""A value that is not finite is an error, where tensors are written and where they are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.detach().float() if x.dtype.itemsize < 2 else x.detach()  # float8 has no minimum and no isinf


def _is_finite(x: Tensor) -> bool:
    if not x.is_floating_point() or not x.numel():
        return True
    # One pass that allocates nothing, and NaN is both minimum and maximum: 0.035 s for the 132 million values
    # of a DiT-S checkpoint, where isfinite().all() took 0.8 s (two cores with AVX-512).
    return bool(torch.stack(_wide(x).aminmax()).isfinite().all())


def check_finite(source: object, tensors: Mapping[str, Tensor], advice: str) -> None:
    """Raise an error in the name of `source` if a floating-point tensor holds NaN or an infinity.

    Args:
        tensors: of any shape, dtype and device.
        advice: the last part of the message.

    Raises:
        ValueError: names the first such tensor, and counts its values and the further tensors.
    """
    found = [name for name, x in tensors.items() if not _is_finite(x)]
    if found:
        x = _wide(tensors[found[0]])
        nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
        more = f", nor are {len(found) - 1} more tensors" if len(found) > 1 else ""
        raise ValueError(
            f"{source}: {found[0]} is not finite ({nan} NaN and {inf} infinite of {x.numel()} values)"
            f"{more}; {advice}"
        )

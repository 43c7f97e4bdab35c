"""Reference files of ADM's evaluation suite: moments of Inception's features, and some images."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ard.checkpoints import replacing
from ard.features import Extractor
from ard.metrics import Moments
from ard.models.inception import FEATURES, SPATIAL
from ard.npz import NpzImages, names, read_floats


@dataclass(frozen=True)
class AdmReference:
    """Contents of a reference file. Moments are (mean, covariance)."""

    moments: tuple[Tensor, Tensor] | None
    spatial: tuple[Tensor, Tensor] | None
    images: NpzImages | None

    @classmethod
    def load(cls, path: Path) -> AdmReference:
        held = names(path)

        def pair(mean: str, covariance: str, size: int) -> tuple[Tensor, Tensor] | None:
            if not {mean, covariance} <= held:
                return None
            return read_floats(path, mean, (size,)), read_floats(path, covariance, (size, size))

        images = NpzImages(path) if "arr_0" in held else None
        moments = pair("mu", "sigma", FEATURES)
        if moments is None and images is None:
            raise ValueError(
                f"{path}: holds {', '.join(sorted(held)) or 'no arrays'}; accepted are mu and sigma, or "
                "images arr_0"
            )
        return cls(moments, pair("mu_s", "sigma_s", SPATIAL), images)


@torch.no_grad()
def write_adm_reference(
    path: Path, parts: Iterable[Tensor], shape: tuple[int, int, int, int], extractor: Extractor
) -> None:
    """Write moments of all images, and the first of the images, as ADM's evaluator reads them.

    Args:
        path: the .npz file.
        parts: all images in parts, (n, C, h, w) uint8.
        shape: of `arr_0`, (images to keep, h, w, C).
        extractor: with spatial features.
    """
    assert extractor.both is not None
    moments, spatial, missing = Moments(), Moments(), shape[0]
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # Members without a time: the same images give the same file. 4 GiB are more than plain zip takes.
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
            for part in parts:
                if missing > 0:
                    file.write(part[:missing].permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                    missing -= len(part[:missing])
                features, other = extractor.both(part)
                moments.add(features)
                spatial.add(other)
        for name, values in (
            ("mu", moments.mean),
            ("sigma", moments.covariance),
            ("mu_s", spatial.mean),
            ("sigma_s", spatial.covariance),
        ):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
                np.lib.format.write_array(file, values.numpy(), (1, 0), False)  # type: ignore[no-untyped-call]

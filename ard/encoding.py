"""Latents of a folder of images, made once by a VAE and cached for training, see `LatentStore`.

Every image is encoded as it is and mirrored: a mirrored latent is not the latent of the mirrored image.

    latents (n, 2, C, h, w), [:, 1] of the mirrored images   labels (n,) int64
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard.checkpoints import read_json, sha256
from ard.data import ImageFolder, LatentStore, Stream, check_counts, check_seed, index_noise
from ard.precision import PrecisionConfig, computing, settled
from ard.shards import DTYPES, Shards, StoredDtype, began_with, worker, worker_device

_VAE_CONFIG, VAE_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class EncodeConfig(PrecisionConfig):
    """Encode a folder of images with a VAE, as they are and mirrored. A store that is there is continued;
    processes may share the work."""

    images: Path
    """Folder of images in a subfolder per class."""
    vae: Path
    """Folder of a diffusers AutoencoderKL: config.json and diffusion_pytorch_model.safetensors."""
    out: Path
    """Folder of the store."""
    size: int = 256
    """Height and width in pixels to which images are resized and cropped."""
    dtype: StoredDtype = "float16"
    """How latents are stored."""
    shard_size: int = 1000
    """Images per file."""
    batch_size: int = 16
    """Images per pass of the VAE, in which each is twice."""
    seed: int = 0
    """Seed of the noise by which latents are sampled; that of an image depends on (seed, its index) alone."""


def encode(config: EncodeConfig) -> None:
    """Write the store, or what is missing of it.

    A latent is a sample z = mean + deviation * noise of the VAE's posterior, as the model sees it: the VAE's
    scaling_factor times z (0.18215 in Stable Diffusion; arXiv 2112.10752, appendix G). Where the VAE has a
    shift_factor, z is less by that first.

    Raises:
        ValueError: an option, the VAE or an image is not accepted, diffusers is not installed, or the folder
            holds other latents.
    """
    device = worker_device()
    precision, _ = settled(config.precision, device, config.out, began_with(config.out, "precision"))
    config = replace(config, precision=precision)
    check_counts("encode", size=config.size, shard_size=config.shard_size, batch_size=config.batch_size)
    check_seed(config.seed, "encode")
    vae = load_vae(config.vae)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if config.size % factor:
        raise ValueError(f"encode: size is {config.size}, accepted by this VAE are multiples of {factor}")
    shape = (vae.config.latent_channels, config.size // factor, config.size // factor)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    images = ImageFolder(config.images, config.size, vae.config.in_channels)
    manifest = {
        "format": LatentStore.FORMAT, "images": images.checksum(), "size": config.size,
        "vae": {name: sha256(config.vae / name) for name in (_VAE_CONFIG, VAE_WEIGHTS)},
        "scaling_factor": scale, "shift_factor": shift, "shape": list(shape),
        "samples": len(images), "shard_size": config.shard_size, "batch_size": config.batch_size,
        "dtype": config.dtype, "precision": config.precision, "seed": config.seed, "classes": images.classes,
    }  # fmt: skip
    shards = Shards.begin(config.out, "encode", manifest)
    vae.to(device)

    def latents(indices: Tensor) -> dict[str, Tensor]:
        pixels, labels = images.fetch(indices, torch.zeros(len(indices), dtype=torch.bool))
        both = torch.stack([pixels, pixels.flip(-1)], 1).to(device)  # (n, 2, channels, size, size)
        with torch.no_grad(), computing(config.precision, device):
            posterior = vae.encode(both.flatten(0, 1)).latent_dist
        noise = index_noise(indices, (2, *shape), config.seed, Stream.ENCODE).to(device)
        z = posterior.mean.float() + posterior.std.float() * noise.flatten(0, 1)
        stored = ((z - shift) * scale).to(DTYPES[config.dtype])
        if not stored.isfinite().all():
            raise ValueError(
                f"encode: latents of images {indices[0]}..{indices[-1]} are not finite; dtype is "
                f"{config.dtype!r}, precision {config.precision!r}; try --dtype float32"
            )
        return {"latents": stored.unflatten(0, (-1, 2)).cpu(), "labels": labels}

    shards.fill(latents, config.batch_size, "image")
    if worker()[0] == 0:
        print(f"latents: {config.out} ({len(images)} images of {images.num_classes} classes)")


def decode(vae: Any, latents: Tensor, batch: int = 8) -> Tensor:
    """Latents as a model sees them (n, C, h, w) -> images (n, channels, H, W) about [-1, 1], in the VAE's
    dtype, `batch` at a time: of an image of 256x256, Stable Diffusion's decoder holds several activations of
    256 channels at full size, 67 MB each, and the image is 0.8 MB."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    parts = latents.to(vae.dtype).split(batch)
    return torch.cat([vae.decode(part / scale + shift).sample for part in parts])


def load_decoder(folder: Path, channels: int, device: torch.device, where: str) -> Any:
    """The AutoencoderKL of a folder, for latents of so many channels; errors are `where`'s."""
    vae = load_vae(folder)
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"{where}: vae is {folder}, of {vae.config.latent_channels} latent channels, the student has "
            f"{channels}"
        )
    return vae.to(device)


def load_vae(folder: Path) -> Any:
    """The AutoencoderKL of a folder, in evaluation mode and without gradients."""
    for name in (_VAE_CONFIG, VAE_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"vae is {folder}, without {name}; accepted is the folder of a diffusers AutoencoderKL "
                f"({_VAE_CONFIG} and {VAE_WEIGHTS}; in a folder of Stable Diffusion it is the subfolder vae)"
            )
    described = read_json(folder / _VAE_CONFIG)
    found = described.get("_class_name") if isinstance(described, dict) else None
    if found != "AutoencoderKL":
        raise ValueError(f"{folder / _VAE_CONFIG}: holds a {found}, accepted is an AutoencoderKL")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(
            f"a VAE needs the extra `diffusers` (pip install '.[diffusers]' in the repository): {error}"
        ) from None
    vae, info = AutoencoderKL.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        torch_dtype=torch.float32,  # whatever the file has
    )
    if complaints := [f"{kind.split('_')[0]} {name}" for kind, names in info.items() for name in names]:
        raise ValueError(
            f"{folder / VAE_WEIGHTS}: does not fit its {_VAE_CONFIG}: {'; '.join(complaints[:4])}"
        )
    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
        raise ValueError(f"{folder / _VAE_CONFIG}: has latents_mean or latents_std, accepted is null")
    return vae.eval().requires_grad_(False)

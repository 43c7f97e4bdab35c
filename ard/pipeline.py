"""A student as a pipeline of diffusers. That is an optional extra: importing `ard` does not need it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard.checkpoints import CONFIG
from ard.encoding import decode
from ard.models import ARDTransformer
from ard.sampling import sample

try:
    from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines import pipeline_loading_utils
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(f"needs diffusers: pip install '.[diffusers]' in the repository ({error})") from error

# diffusers saves and loads the parts of a pipeline whose classes it knows.
_METHODS = ["save_pretrained", "from_pretrained"]
pipeline_loading_utils.LOADABLE_CLASSES[ARDTransformer.__module__] = {ARDTransformer.__name__: _METHODS}
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES[ARDTransformer.__name__] = _METHODS
_OUTPUTS = ("pil", "np", "pt", "latent")


class ARDPipeline(DiffusionPipeline):  # type: ignore[misc]  # to mypy, which does not read it, diffusers is Any
    """Images from a student, in S network evaluations.

    Args:
        student: the student.
        vae: decodes its latents; a student in pixels needs none.

    `save_pretrained` puts the student into the subfolder `student`, as `ard distill` would write it.
    `ARDPipeline.from_pretrained` loads that (diffusers' DiffusionPipeline does not know the class), or the
    folder of a student alone, with which its `vae` may be given.
    """

    _optional_components = ["vae"]  # noqa: RUF012  declared by diffusers

    def __init__(self, student: ARDTransformer, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.register_modules(student=student, vae=vae)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> ARDPipeline:
        """Load a saved pipeline, from a folder or a repository, or a student's folder.

        Args:
            pretrained_model_name_or_path: the folder, or the name of a repository.
            options: diffusers'; of a student's folder accepted are vae and torch_dtype.

        Raises:
            ValueError: another option with a student's folder.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / CONFIG).is_file() or (folder / cls.config_name).is_file():
            return super().from_pretrained(pretrained_model_name_or_path, **options)  # type: ignore[no-any-return]
        vae, dtype = options.pop("vae", None), options.pop("torch_dtype", None)
        if options:
            raise ValueError(f"ARDPipeline: {', '.join(options)} is given, but {folder} is a student's "
                             "folder, with which vae and torch_dtype are accepted")  # fmt: skip
        return cls(ARDTransformer.from_pretrained(folder, torch_dtype=dtype), vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        num_images: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample images.

        Args:
            class_labels: one class or several, each in 0..num_classes-1.
            num_images: how many images of each; those of a class come one after the other.
            generator: of the noise; one, or one per image.
            latents: the noise itself, (images, C, h, w), instead of drawing it.
            output_type: "pil", a list of pictures; "np", (images, H, W, channels) in [0, 1]; "pt", (images,
                channels, H, W) in [0, 1]; "latent", the student's result (images, C, h, w) as it is.
            return_dict: return a tuple of the images if False.

        Returns:
            ImagePipelineOutput with `images`.

        Raises:
            ValueError: an argument that does not fit; the message names it.
        """
        student, vae = self.student, self.vae
        if output_type not in _OUTPUTS:
            raise ValueError(
                f"ARDPipeline: output_type is {output_type!r}, accepted are {', '.join(_OUTPUTS)}"
            )
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"ARDPipeline: num_images is {num_images}, accepted is an integer >= 1")
        if vae is None and output_type != "latent" and student.channels not in (1, 3):
            raise ValueError(f"ARDPipeline: vae is None, and {student.channels} channels are no picture; "
                             "accepted are a vae, or output_type='latent'")  # fmt: skip
        labels = torch.as_tensor(class_labels, device=student.device).reshape(-1)
        labels = labels.repeat_interleave(num_images)
        if isinstance(generator, Sequence) and len(generator) != len(labels):
            raise ValueError(f"ARDPipeline: generator has length {len(generator)}, accepted are one, or one "
                             f"of each of the {len(labels)} images")  # fmt: skip
        if latents is None:
            shape = (len(labels), student.channels, *student.input_size)
            latents = randn_tensor(shape, generator=generator, device=student.device, dtype=student.dtype)
        result = sample(student, latents.to(student.device, student.dtype), labels)[:, -1]
        if output_type != "latent" and vae is not None:
            result = decode(vae, result)
        images = VaeImageProcessor().postprocess(result, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

"""save_pretrained, from_pretrained, push_to_hub: a model and its folder, here or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download

from ard.checks import check_local

_CARD = """---
{{ card_data }}
---

A model of ARD, AutoRegressive Distillation of diffusion transformers ({{ paper_url }}): config.json names its
class, a `DiT` or an `ARDTransformer`. In Python: `from ard.models import ARDTransformer`, then
`ARDTransformer.from_pretrained("this/repository")`. `ard sample --student` takes a local copy of the files.
"""


class Pretrained(
    PyTorchModelHubMixin,
    library_name="ard",
    tags=["autoregressive-distillation", "diffusion-transformer"],
    paper_url="https://arxiv.org/abs/2504.11295",
    model_card_template=_CARD,
):
    """Gives a model huggingface_hub's methods, on the folder format of `ard.checkpoints`.

    `from_pretrained(folder or repository)` returns the model in evaluation mode and without gradients, cast
    to torch_dtype if one is given. It never reads anything but config.json and model.safetensors. A folder
    that holds something else, or weights that do not fit, is a ValueError.
    """

    def _save_folder(self, folder: Path) -> None:
        """Write config.json and model.safetensors into an existing folder."""
        raise NotImplementedError

    @classmethod
    def _load_folder(cls, folder: Path) -> Self:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        check_local("from_pretrained", "pretrained_model_name_or_path", pretrained_model_name_or_path)
        model: Self = super().from_pretrained(pretrained_model_name_or_path, **options)
        return model

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        check_local("save_pretrained", "save_directory", save_directory)
        saved: str | None = super().save_pretrained(save_directory, **options)
        return saved

    def _save_pretrained(self, save_directory: Path) -> None:
        self._save_folder(save_directory)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, torch_dtype: torch.dtype | None = None, **download: Any
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            files = ["config.json", "model.safetensors"]
            folder = Path(snapshot_download(model_id, allow_patterns=files, **download))
        model = cls._load_folder(folder)
        if torch_dtype is not None:
            model.to(torch_dtype)  # type: ignore[attr-defined]
        return model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.parameters()).device  # type: ignore[attr-defined]
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = next(self.parameters()).dtype  # type: ignore[attr-defined]
        return dtype

"""ARD, AutoRegressive Distillation of diffusion transformers (arXiv 2504.11295): models, trainer and
sampler."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ard.sampling import sample
else:

    def __getattr__(name: str) -> object:
        """`sample` when it is first asked for: `ard.models` needs none of what it imports."""
        if name == "sample":
            from ard.sampling import sample

            return sample
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["sample"]

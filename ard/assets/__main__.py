"""Round the folder of a teacher or a student to float16, as it is embedded: python -m ard.assets FROM TO."""

import sys
from pathlib import Path

from torch import Tensor, nn

from ard.checkpoints import (
    CONFIG,
    load_student,
    load_teacher,
    read_json,
    save_student,
    save_teacher,
)


def _rounded(model: nn.Module) -> dict[str, Tensor]:
    return {name: x if name == "pos_embed" else x.half() for name, x in model.state_dict().items()}


source, target = (Path(argument) for argument in sys.argv[1:])
if read_json(source / CONFIG)["class"] == "ARDTransformer":
    student, trajectories = load_student(source)
    save_student(target, student, trajectories, _rounded(student))
else:
    teacher, diffusion = load_teacher(source)
    save_teacher(target, teacher, diffusion, _rounded(teacher))

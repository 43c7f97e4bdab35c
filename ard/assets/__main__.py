"""Round a teacher's folder to float16, as it is embedded: python -m ard.assets FROM TO."""

import sys
from pathlib import Path

from ard.checkpoints import load_teacher, save_teacher

source, target = (Path(argument) for argument in sys.argv[1:])
model, diffusion = load_teacher(source)
weights = {name: x if name == "pos_embed" else x.half() for name, x in model.state_dict().items()}
save_teacher(target, model, diffusion, weights)

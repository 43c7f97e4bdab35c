"""Set before anything imports Triton: without a GPU its kernels run in its interpreter.

And one thread a process: `make test` runs as many processes as there are cores.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

"""One thread for torch: on a busy machine two are many times slower, and results do not depend on it."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

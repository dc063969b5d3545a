"""Which devices are GPUs."""

from __future__ import annotations

import torch

pretended = False
"""Whether the CPU is to be taken for a GPU: tests then run what is meant for one, with stand-ins for torch.cuda."""


def is_gpu(device: torch.device | str) -> bool:
    """Whether work on this device is queued, timed by events and can be captured in graphs."""
    return pretended or torch.device(device).type == "cuda"

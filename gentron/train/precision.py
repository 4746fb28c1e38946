"""What training computes in: bfloat16 where a device has instructions for it."""

from __future__ import annotations

import torch

# Of `torch.backends.cpu.get_cpu_capability()`: these take a hundred times as long in bfloat16.
WITHOUT_BFLOAT16 = ("NO AVX", "DEFAULT", "AVX2")


def mixed(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16; on CPUs that have to emulate it, everything stays in float32."""
    capability = torch.backends.cpu.get_cpu_capability()
    quick = device.type != "cpu" or capability not in WITHOUT_BFLOAT16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=quick)

"""What a CPU would have to emulate is not asked of it."""

from __future__ import annotations

import pytest
import torch

from gentron.train.precision import mixed


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("AVX512", torch.bfloat16), ("AVX2", torch.float32), ("DEFAULT", torch.float32)],
)
def test_a_product_is_of_bfloat16_where_that_is_quick(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with mixed(torch.device("cpu")):
        assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == dtype

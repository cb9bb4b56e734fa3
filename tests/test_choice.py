"""Which attention a graph gets. References: attention that is known to be slow or fast."""

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewshot_rt.export import choice
from fewshot_rt.export.choice import Measured
from fewshot_rt.kernels.swap import Site

SITE = Site(
    node="a", heads=2, length=64, key_length=16, width=32, dtype=torch.float32, is_masked=False,
    is_normed=False,
)  # fmt: skip


def test_a_processor_keeps_torchs_attention() -> None:
    assert not Measured("cpu", torch.float32)(SITE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_slower_one_is_not_taken(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    measured = Measured("cpu", dtype)
    # On the CPU both are the same arithmetic, so neither is many times slower.
    assert 1 / 5 < measured.compare(SITE) < 5

    def slow(*tensors: Any) -> Any:
        assert [list(t.shape) for t in tensors] == [[2, 2, 64, 32], [2, 2, 16, 32], [2, 2, 16, 32]]
        assert {t.dtype for t in tensors} == {dtype}
        time.sleep(0.02)

    monkeypatch.setattr(choice, "_torchs", slow)
    assert measured.compare(SITE) < 1


def test_lengths_that_vary_are_left_alone() -> None:
    assert Measured("cpu", torch.float32).compare(replace(SITE, key_length=None)) == math.inf


def test_every_shape_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured("cuda", torch.bfloat16)
    monkeypatch.setattr(choice, "HAS_TRITON", True)
    asked: list[Site] = []

    def compare(site: Site) -> float:
        asked.append(site)
        return {32: 0.9, 64: 1.1}[site.width]

    monkeypatch.setattr(measured, "compare", compare)
    wide = replace(SITE, width=64)
    assert [measured(site) for site in (SITE, wide, SITE, wide)] == [True, False, True, False]
    assert asked == [SITE, wide]
    assert not measured(replace(SITE, is_masked=True))
    monkeypatch.setattr(choice, "HAS_TRITON", False)
    assert not measured(SITE)

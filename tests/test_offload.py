"""A denoiser whose blocks wait on the CPU: here they are brought from the CPU to the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.hooks.group_offloading import ModuleGroup
from tiny import cogvideox, ltx, wan
from torch import nn

from fewshot_rt.errors import ModelError
from fewshot_rt.fit import fit, probe
from fewshot_rt.runs import open_run
from fewshot_rt.train_config import TrainConfig

BLOCKS = 2  # of every tiny transformer
FAMILIES = {
    "cogvideox": (cogvideox, "1.5", "48x32"),
    "ltx": (ltx, "0.9.5", "32x32"),
    "wan": (wan, "2.2-5B", "32x32"),
    "experts": (wan, "2.2-A14B", "32x32"),
}


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_and_one_block_is_brought_at_a_time(
    tmp_path: Path,
    make_text_encoder: Any,
    write_noise_pairs: Any,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    weights: str,
) -> None:
    maker, version, size = FAMILIES[family]
    text = make_text_encoder(is_multilingual=True) if maker is wan else make_text_encoder()
    folder = maker.write(tmp_path / family, version, text)
    width, height = map(int, size.split("x"))
    write_noise_pairs(tmp_path / "pairs", (height, width))
    run = tmp_path / "runs" / "one"
    config = TrainConfig(
        base=str(folder), hold_out=0, size=size, steps=1, batch=1, rank=2, rate=0.02
    )
    *_, _ = fit(tmp_path / "pairs", run, config)
    plain = open_run(run, weights=weights)
    expected = plain.answer(probe(plain))
    there: list[Any] = []
    most = 0

    def bring(group: Any) -> None:
        nonlocal most
        there.append(group)
        held = [g for g in there if any(_is_block(module) for module in g.modules)]
        most = max(most, len(held))
        brought(group)

    def let_go(group: Any) -> None:
        if group in there:
            there.remove(group)
        left(group)

    brought, left = ModuleGroup.onload_, ModuleGroup.offload_
    monkeypatch.setattr(ModuleGroup, "onload_", bring)
    monkeypatch.setattr(ModuleGroup, "offload_", let_go)
    lean = open_run(run, weights=weights, offload=True)
    np.testing.assert_array_equal(lean.answer(probe(lean)), expected)
    assert (most, there) == (1, [])


def _is_block(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Block")


def test_pocket_has_nothing_to_offload(tiny_base: Any) -> None:
    with pytest.raises(ModelError, match="small enough"):
        tiny_base.offloaded()


def test_where_offloading_is_no_use_it_is_refused(exported: Any) -> None:
    images = Path("pairs/test/input").resolve()
    status, _, errors = exported("predict", images, "--offload")
    assert (status, "--device cuda" in errors) == (2, True)

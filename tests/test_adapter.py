"""Adapters, against what PEFT and diffusers make of the same files."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewshot_rt.adapter import Adapter, Provenance, add_lora, snapshot
from fewshot_rt.bases import open_base
from fewshot_rt.errors import ModelError
from fewshot_rt.versions import versions


def provenance(base: Any) -> Provenance:
    return Provenance(
        base=base.name,
        revision=base.revision,
        task="coins",
        digest="0" * 16,
        shots=3,
        seed=1,
        objective="onestep",
        versions=versions(),
    )


@torch.no_grad()
def perturbed(base: Any) -> Adapter:
    """An adapter with random weights everywhere, as if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in add_lora(base, rank=4, alpha=8, seed=0):
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return snapshot(base, provenance(base))


@torch.no_grad()
def predict(base: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 8, 2, 8, 8, generator=generator)
    first = torch.randn(2, 8, 1, 8, 8, generator=generator)
    prediction: torch.Tensor = base.denoiser()(
        noisy, torch.tensor([0.3, 1.0]), first, **base.embed("mask")
    )
    return prediction


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_fresh_adapter_changes_nothing_bit_for_bit(tiny_base):
    before = predict(tiny_base)
    parameters = add_lora(tiny_base, rank=4, alpha=8, seed=0)
    assert torch.equal(predict(tiny_base), before)
    assert all(p.requires_grad for _, p in parameters)
    trainable = {n for n, p in tiny_base.denoiser().named_parameters() if p.requires_grad}
    assert len(trainable) == len(parameters)
    assert all("lora_" in name for name in trainable)


def test_adapter_covers_attention_feed_forward_and_both_ends(tiny_base):
    names = {name.split(".lora_")[0] for name, _ in add_lora(tiny_base, rank=2, alpha=2, seed=0)}
    # Self-attention, cross-attention, feed-forward, and the layers into and out of the latents.
    assert len(names) == 4 + 4 + 2 + 2


def test_fresh_adapter_depends_on_the_seed_alone(tiny_base_folder):
    def first(seed: int) -> torch.Tensor:
        base = open_base(str(tiny_base_folder))
        return add_lora(base, rank=4, alpha=4, seed=seed)[0][1].detach()

    torch.manual_seed(99)
    assert torch.equal(first(5), first(5))
    assert not torch.equal(first(5), first(6))


def test_merged_equals_attached(tiny_base, tiny_base_folder):
    adapter = perturbed(tiny_base)
    attached = predict(tiny_base)
    fresh = open_base(str(tiny_base_folder))
    bare = predict(fresh)
    adapter.merge(fresh)
    # The house's limit for merged against attached, fp32.
    assert relative(predict(fresh), attached) < 1e-5
    assert relative(bare, attached) > 0.05
    assert not any("lora" in name for name, _ in fresh.denoiser().named_parameters())


def test_merge_is_the_closed_form(tiny_base, tiny_base_folder):
    adapter = perturbed(tiny_base)
    fresh = open_base(str(tiny_base_folder))
    layer = "blocks.0.attn1.to_q"
    weight = fresh.denoiser().transformer.get_parameter(f"{layer}.weight").detach().clone()
    down, up = (adapter.weights[f"{layer}.lora_{side}.weight"] for side in "AB")
    adapter.merge(fresh)
    merged = fresh.denoiser().transformer.get_parameter(f"{layer}.weight")
    torch.testing.assert_close(merged, weight + 8 / 4 * up @ down)


def test_save_and_load_keep_everything(tiny_base, tmp_path):
    adapter = perturbed(tiny_base)
    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.provenance == adapter.provenance
    assert (loaded.config.r, loaded.config.lora_alpha) == (4, 8)
    assert set(loaded.weights) == set(adapter.weights)
    assert all(torch.equal(loaded.weights[n], adapter.weights[n]) for n in adapter.weights)


def test_peft_loads_the_adapter_folder(tiny_base, tiny_base_folder, tmp_path):
    from peft import PeftModel

    perturbed(tiny_base).save(tmp_path)
    expected = predict(tiny_base)
    fresh = open_base(str(tiny_base_folder))
    transformer = fresh.denoiser().transformer
    wrapped = PeftModel.from_pretrained(transformer, tmp_path / "adapter")
    assert relative(predict(fresh), expected) < 1e-6
    assert wrapped.peft_config["default"].r == 4


def test_diffusers_loads_the_weights_file(tiny_base, tiny_base_folder, tmp_path):
    perturbed(tiny_base).save(tmp_path)
    expected = predict(tiny_base)
    fresh = open_base(str(tiny_base_folder))
    # alpha / rank is 2 here: without the metadata diffusers would take 1.
    fresh.denoiser().transformer.load_lora_adapter(
        tmp_path, prefix="transformer", use_safetensors=True, metadata=_metadata(tmp_path)
    )
    assert relative(predict(fresh), expected) < 1e-6


def _metadata(folder) -> dict[str, Any]:
    from diffusers import WanPipeline

    _, metadata = WanPipeline.lora_state_dict(folder, return_lora_metadata=True)
    return {k: v for k, v in metadata.items() if k.startswith("transformer.")}


def test_missing_adapter_says_what_to_do(tmp_path):
    with pytest.raises(ModelError, match=r"holds no adapter.*fewshot-rt train"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_adapter_is_refused(tiny_base, tmp_path, name, damage):
    perturbed(tiny_base).save(tmp_path)
    path = tmp_path / "adapter" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    else:
        path.unlink()
    with pytest.raises(ModelError, match="is damaged"):
        Adapter.load(tmp_path)


def test_adapter_for_another_base_is_refused(tiny_base, tiny_base_folder, tmp_path):
    perturbed(tiny_base).save(tmp_path)
    path = tmp_path / "adapter" / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "other"}))
    with pytest.raises(ModelError, match="made for base 'tiny' revision other"):
        Adapter.load(tmp_path).merge(open_base(str(tiny_base_folder)))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_adapter_that_does_not_load_whole_is_refused(tiny_base, tiny_base_folder, change):
    adapter = perturbed(tiny_base)
    weights = dict(adapter.weights)
    name = next(iter(weights))
    if change == "shape":
        weights[name] = weights[name][:, :-1]
    else:
        value = weights.pop(name)
        if change == "extra":
            weights |= {name: value, "blocks.9.attn1.to_q.lora_A.weight": value}
    with pytest.raises(ModelError, match="does not"):
        replace(adapter, weights=weights).merge(open_base(str(tiny_base_folder)))

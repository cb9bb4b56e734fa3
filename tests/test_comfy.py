"""Adapters for ComfyUI, against diffusers' converters and the layers of ComfyUI's own models.

ComfyUI itself is not installed here. What it has was read at its commit 783545f of 2026-08-22.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewshot_rt.adapter import COMFY_FILES, EXPERT_FILES, Adapter, Provenance, add_lora, snapshot
from fewshot_rt.bases.cogvideox import CogVideoXBase
from fewshot_rt.bases.ltx import LTXBase
from fewshot_rt.bases.pocket import PocketBase
from fewshot_rt.bases.wan import Experts, WanBase
from fewshot_rt.comfy import comfy_name, comfy_weights

RANK, ALPHA = 4, 6
FILE, SECOND = COMFY_FILES.values()
FAMILIES = {
    "wan": WanBase,
    "wan-image": WanBase,
    "wan-experts": WanBase,
    "ltx": LTXBase,
    "cogvideox": CogVideoXBase,
}
# The linear layers of a block (comfy/ldm/{wan,lightricks,cogvideo}/model.py).
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
COMFY_LAYERS = {
    "wan": (
        *(f"blocks.{{}}.{kind}_attn.{layer}" for kind in ("self", "cross") for layer in "qkvo"),
        *("blocks.{}.cross_attn.k_img", "blocks.{}.cross_attn.v_img"),
        *("blocks.{}.ffn.0", "blocks.{}.ffn.2"),
    ),
    "ltx": (
        *(f"transformer_blocks.{{}}.attn{n}.{layer}" for n in (1, 2) for layer in ATTENTION),
        *("transformer_blocks.{}.ff.net.0.proj", "transformer_blocks.{}.ff.net.2"),
    ),
    "cogvideox": tuple(f"blocks.{{}}.{layer}" for layer in ("q", "k", "v", "attn_out")),
}


class Denoiser(nn.Module):
    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer.eval().requires_grad_(False)


@dataclass
class StandIn:
    """What adapters ask of a base, without autoencoder and text encoder."""

    module: Denoiser
    lora_targets: tuple[str, ...]
    comfy_names: Any
    name: str = "tiny"
    revision: str = "0"

    def denoiser(self) -> Denoiser:
        return self.module


def make_transformer(kind: str) -> Any:
    import diffusers

    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_layers": 2, "in_channels": 4}
    if kind.startswith("wan"):
        sizes |= {"attention_head_dim": 12, "out_channels": 4, "text_dim": 16, "freq_dim": 16}
        sizes |= {"ffn_dim": 32, "rope_max_seq_len": 64}
        if kind == "wan-image":
            sizes |= {"image_dim": 16, "added_kv_proj_dim": 24}
        return diffusers.WanTransformer3DModel(**sizes)
    if kind == "ltx":
        sizes |= {"attention_head_dim": 8, "out_channels": 4, "caption_channels": 16}
        return diffusers.LTXVideoTransformer3DModel(**sizes, cross_attention_dim=16)
    sizes |= {"attention_head_dim": 16, "out_channels": 4, "time_embed_dim": 4, "sample_width": 4}
    sizes |= {"text_embed_dim": 16, "sample_height": 4, "sample_frames": 9}
    return diffusers.CogVideoXTransformer3DModel(**sizes, max_text_seq_length=8)


def make_base(kind: str) -> StandIn:
    """A tiny base of a family, always the same."""
    torch.manual_seed(0)
    transformer = make_transformer(kind)
    if kind == "wan-experts":
        transformer = Experts(transformer, make_transformer(kind), boundary=0.9)
    targets = FAMILIES[kind].lora_targets
    if kind == "wan-image":
        targets = (*targets, "add_k_proj", "add_v_proj")
    return StandIn(Denoiser(transformer), targets, FAMILIES[kind].comfy_names)


@torch.no_grad()
def perturbed(base: Any) -> Adapter:
    """An adapter with random weights everywhere, as if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in add_lora(base, rank=RANK, alpha=ALPHA, seed=0):
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    told = {"base": "tiny", "revision": "0", "task": "coins", "digest": "0", "objective": "onestep"}
    return snapshot(base, Provenance(**told, shots=1, seed=0, versions={}))


@torch.no_grad()
def predict(kind: str, transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy, prompt = (torch.randn(1, *s, generator=generator) for s in ((4, 3, 4, 4), (8, 16)))
    time = torch.tensor([500.0])
    options: dict[str, Any] = {"return_dict": False}
    if kind.startswith("wan"):
        seen = torch.randn(1, 5, 16, generator=generator) if kind == "wan-image" else None
        found = transformer(noisy, time, prompt, encoder_hidden_states_image=seen, **options)
    elif kind == "ltx":
        options |= {"num_frames": 3, "height": 4, "width": 4}
        found = transformer(noisy.flatten(2).transpose(1, 2), prompt, time, None, **options)
    else:
        found = transformer(noisy.transpose(1, 2), prompt, time, **options)
    prediction: Tensor = found[0]
    return prediction


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def layers_of(weights: dict[str, Tensor]) -> set[str]:
    return {name.split(".lora_")[0] for name in weights if ".lora_" in name}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in found)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_key_is_one_that_comfyui_looks_for(kind, tmp_path):
    adapter = perturbed(make_base(kind))
    adapter.save(tmp_path)
    family = kind.split("-")[0]
    known = {f"diffusion_model.{n.format(b)}" for n in COMFY_LAYERS[family] for b in range(2)}
    files = [FILE, SECOND] if kind == "wan-experts" else [FILE]
    assert sorted(path.name for path in tmp_path.glob("comfyui*")) == files
    count = 0
    for file in files:
        weights = load_file(tmp_path / file)
        layers = layers_of(weights)
        assert layers <= known
        sides = ("alpha", "lora_A.weight", "lora_B.weight")
        assert set(weights) == {f"{layer}.{side}" for layer in layers for side in sides}
        assert all(weights[f"{layer}.alpha"].item() == ALPHA for layer in layers)
        count += len(layers)
    assert count == len(layers_of(dict(adapter.weights)))


@pytest.mark.parametrize("kind", ["wan", "wan-image", "wan-experts"])
def test_diffusers_reads_a_wan_file_back(kind, tmp_path):
    """Its converter puts alpha / rank, here 1.5, into lora_A."""
    from diffusers import WanImageToVideoPipeline

    base = make_base(kind)
    adapter = perturbed(base)
    adapter.save(tmp_path)
    fresh, attached = make_base(kind).module.transformer, base.module.transformer
    pipeline = WanImageToVideoPipeline(
        **dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler")),
        transformer=getattr(fresh, "transformer", fresh),
        transformer_2=getattr(fresh, "transformer_2", None),
    )
    for expert, file in COMFY_FILES.items():
        part = expert.removesuffix(".")
        if getattr(pipeline, part) is None:
            assert not (tmp_path / file).exists()
            continue
        prefix = expert if kind == "wan-experts" else ""
        expected = {
            f"transformer.{name.removeprefix(prefix)}": value * (1.5 if "lora_A" in name else 1)
            for name, value in adapter.weights.items()
            if name.startswith(prefix)
        }
        assert same(pipeline.lora_state_dict(tmp_path / file), expected)
        bare = predict(kind, getattr(pipeline, part))
        pipeline.load_lora_weights(
            tmp_path / file, adapter_name=part, load_into_transformer_2=part != "transformer"
        )
        answer = predict(kind, getattr(attached, part, attached))
        assert relative(predict(kind, getattr(pipeline, part)), answer) < 1e-6
        assert relative(bare, answer) > 0.05


def test_diffusers_reads_an_ltx_file_back(tmp_path):
    """Its converter leaves alphas where they are, and its loader must be given them apart."""
    from diffusers import LTXPipeline

    base = make_base("ltx")
    adapter = perturbed(base)
    adapter.save(tmp_path)
    found = LTXPipeline.lora_state_dict(tmp_path / FILE)
    weights = {name: value for name, value in found.items() if ".lora_" in name}
    assert same(weights, {f"transformer.{name}": v for name, v in adapter.weights.items()})
    alphas = {name: value.item() for name, value in found.items() if name.endswith(".alpha")}
    fresh = make_base("ltx").module.transformer
    bare = predict("ltx", fresh)
    fresh.load_lora_adapter(weights, prefix="transformer", network_alphas=alphas)
    answer = predict("ltx", base.module.transformer)
    assert relative(predict("ltx", fresh), answer) < 1e-6
    assert relative(bare, answer) > 0.05


@torch.no_grad()
def test_a_cogvideox_file_does_as_comfyui_applies_it(tmp_path):
    """diffusers cannot read it: names turned back by hand, W + alpha / rank x B A written out."""
    base = make_base("cogvideox")
    adapter = perturbed(base)
    adapter.save(tmp_path)
    file = load_file(tmp_path / FILE)
    layers = {"q": "attn1.to_q", "k": "attn1.to_k", "v": "attn1.to_v", "attn_out": "attn1.to_out.0"}
    fresh = make_base("cogvideox").module.transformer
    bare = predict("cogvideox", fresh)
    turned_back = {}
    for name in layers_of(file):
        up, down = (file[f"{name}.lora_{side}.weight"] for side in "BA")
        _, _, block, layer = name.split(".")
        ours = f"transformer_blocks.{block}.{layers[layer]}"
        turned_back |= {f"{ours}.lora_B.weight": up, f"{ours}.lora_A.weight": down}
        weight = fresh.get_parameter(f"{ours}.weight")
        weight += file[f"{name}.alpha"].item() / down.shape[0] * up @ down
    assert same(turned_back, dict(adapter.weights))
    answer = predict("cogvideox", base.module.transformer)
    assert relative(predict("cogvideox", fresh), answer) < 1e-5
    assert relative(bare, answer) > 0.05


def test_diffusers_still_takes_its_own_file_from_a_run_folder(tmp_path):
    from diffusers import WanPipeline

    adapter = perturbed(make_base("wan-experts"))
    adapter.save(tmp_path)
    (tmp_path / EXPERT_FILES["transformer_2."]).unlink()
    found, metadata = WanPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert metadata["transformer.lora_alpha"] == ALPHA
    first = {n: v for n, v in adapter.weights.items() if n.startswith("transformer.")}
    assert same(found, first)


def test_pocket_has_no_file(tiny_base, tmp_path):
    assert PocketBase.comfy_names is None
    perturbed(tiny_base).save(tmp_path)
    assert (tmp_path / EXPERT_FILES["transformer."]).is_file()
    assert not list(tmp_path.glob("comfyui*"))


def test_names_are_those_of_whole_parts():
    names = {"to_q": "q", "net.0": "0"}
    assert comfy_name("a.to_q.b.net.0", names) == "a.q.b.0"
    assert comfy_name("to_qk.xto_q.net.01.net", names) == "to_qk.xto_q.net.01.net"
    named = comfy_weights({"to_q.lora_A.weight": torch.ones(2, 3)}, names, alpha=8)
    assert {name: tuple(value.shape) for name, value in named.items()} == {
        "diffusion_model.q.lora_A.weight": (2, 3),
        "diffusion_model.q.alpha": (),
    }

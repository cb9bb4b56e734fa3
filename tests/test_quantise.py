"""Frozen weights in few bits: what they cost in memory and in precision, and that LoRA learns."""

import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from fewshot_rt.errors import ModelError
from fewshot_rt.quantise import quantise

# bitsandbytes looks for a faster kernel than the one it has for the CPU.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
# Bits a weight, with the scales of its block; and the error that rounding makes in the output.
COST = {"int8": (8, 8.3, 0.01), "nf4": (4, 4.6, 0.1)}


def make_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=256,
        num_layers=2,
        rope_max_seq_len=16,
    )
    return transformer.eval().requires_grad_(False)


def predict(transformer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noisy, text = (
        torch.randn(shape, generator=generator) for shape in ((1, 4, 2, 8, 8), (1, 6, 32))
    )
    prediction: Tensor = transformer(noisy, torch.tensor([500.0]), text, return_dict=False)[0]
    return prediction


@pytest.mark.parametrize("kind", COST)
def test_weights_take_few_bits_and_adapters_learn_on_them(kind: str) -> None:
    least, most, tolerance = COST[kind]
    transformer = make_transformer()
    expected = predict(transformer)
    linear = [m for n, m in transformer.blocks.named_modules() if isinstance(m, nn.Linear)]
    count = sum(layer.weight.numel() for layer in linear)
    quantise(transformer, kind)
    transformer.to("cpu")
    found = [m for m in transformer.blocks.modules() if isinstance(m, nn.Linear)]
    assert len(found) == len(linear)
    bits = 8 * sum(layer.weight.numel() * layer.weight.element_size() for layer in found) / count
    scales = {
        "int8": lambda layer: layer.weight.SCB,
        "nf4": lambda layer: layer.weight.quant_state.absmax,
    }[kind]
    bits += 8 * sum(scales(m).numel() * scales(m).element_size() for m in found) / count
    assert least <= bits <= most
    assert transformer.proj_out.weight.dtype == torch.float32
    error = (predict(transformer) - expected).norm() / expected.norm()
    assert 0 < error < tolerance

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"]), transformer)
    torch.testing.assert_close(predict(transformer), predict(transformer))
    predict(transformer).square().mean().backward()
    learned = {n: p.grad for n, p in transformer.named_parameters() if "lora_B" in n}
    assert len(learned) == 2 * 3
    assert all(gradient is not None and gradient.norm() > 0 for gradient in learned.values())


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"fewshot-rt\[quantised\]"):
        quantise(make_transformer(), "nf4")

"""Known bases without weights: facts, figures and what people see of them.

References: sizes of files on the Hub, figures computed by hand before there were cards, PEFT.
"""

import json
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fewshot_rt.adapter import add_lora
from fewshot_rt.benchmarks.cards import make_figures
from fewshot_rt.cards import CARDS, Card, find_card, open_empty, read_cards
from fewshot_rt.costs import (
    GPU,
    GPUS,
    Video,
    count_adapter,
    count_parameters,
    list_blocks,
    measure_pass,
    open_on_meta,
)
from fewshot_rt.errors import ModelError
from fewshot_rt.memory import _peak, _update_peak, measure_memory

NAMES = [card.name for card in read_cards()]
COGVIDEOX = "zai-org/CogVideoX1.5-5B-I2V"
SMALL_WAN = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
LARGE_WAN = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"


def card_of(name: str) -> Card:
    card = find_card(name)
    assert card is not None
    return card


@pytest.mark.parametrize("path", sorted(CARDS.glob("*.json")), ids=lambda path: path.stem)
def test_a_card_says_where_its_facts_are_from(path: Path) -> None:
    values = json.loads(path.read_text())
    assert values["sources"]
    if values["name"] != "pocket":
        assert all(source.startswith("https://") for source in values["sources"])
    for key in values["unverified"]:
        part, _, inner = key.partition(".")
        assert not inner or inner in values[part]
        assert part in values


def test_a_base_is_found_by_any_of_its_names() -> None:
    assert NAMES[0] == "pocket"
    assert len(NAMES) == 9
    assert card_of("thudm/cogvideox1.5-5b-i2v").name == COGVIDEOX
    assert (
        card_of("Lightricks/LTX-Video-0.9.8-13B-distilled").name == "Lightricks/LTX-Video-0.9.7-dev"
    )
    assert find_card("zai-org/CogVideoX1.5-5B") is None
    assert card_of("Wan-AI/Wan2.2-I2V-A14B-Diffusers").experts == 2


def test_weights_count_as_here_only_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    card = card_of(COGVIDEOX)
    assert card_of("pocket").is_here()
    assert not card.is_here()
    for name in (card.name, card.also[0]):
        place = tmp_path / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        folder = place / "snapshots" / ("0" * 40)
        (folder / "transformer").mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
        assert not card.is_here()
    (folder / "transformer" / "one.safetensors").write_bytes(b"")
    assert card.is_here()


# Bytes of the files on the Hub over the bytes of a weight, as their pages list them.
HUB_FILES = {
    (COGVIDEOX, "transformer"): (4.98e9 + 4.95e9 + 1.22e9) / 2,
    (COGVIDEOX, "text_encoder"): (4.99e9 + 5.00e9 + 4.87e9 + 4.19e9) / 4,
    ("zai-org/CogVideoX-5b-I2V", "vae"): 431e6 / 2,
    ("Lightricks/LTX-Video", "vae"): 1.68e9 / 4,
}


@pytest.mark.parametrize(("name", "part"), HUB_FILES)
def test_parameters_are_those_of_the_files_on_the_hub(name: str, part: str) -> None:
    assert count_parameters(card_of(name))[part] == pytest.approx(HUB_FILES[name, part], rel=2e-3)


def test_encoders_have_the_parameters_of_their_published_sizes() -> None:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        T5Config,
        T5EncoderModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    xxl: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
    xxl |= {"num_layers": 24, "feed_forward_proj": "gated-gelu"}
    wan = card_of(LARGE_WAN)
    assert wan.image_encoder is not None
    with torch.device("meta"):
        made = {
            "T5EncoderModel": T5EncoderModel(T5Config(vocab_size=32128, **xxl)),
            "UMT5EncoderModel": UMT5EncoderModel(UMT5Config(vocab_size=256384, **xxl)),
            "CLIPVisionModel": CLIPVisionModel(CLIPVisionConfig(**wan.image_encoder["config"])),
        }
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in made.items()}
    for card in read_cards():
        for encoder in filter(None, (card.text_encoder, card.image_encoder)):
            assert encoder["parameters"] == counts[encoder["_class_name"]]
    assert count_parameters(wan)["image_encoder"] == counts["CLIPVisionModel"]


# By hand, before there were cards: tokens, and TFLOP to two digits. Of Wan, what 30 blocks make of
# the prompt's 512 words alone, keys and values, was left out.
BY_HAND = {
    (COGVIDEOX, (480, 720), 5): (1350, 16),
    (COGVIDEOX, (480, 720), 9): (2700, 32),
    (COGVIDEOX, (480, 720), 49): (9450, 140),
    (SMALL_WAN, (704, 1280), 5): (1760, 17),
    (SMALL_WAN, (704, 1280), 49): (11440, 150),
}


@pytest.mark.parametrize(("name", "size", "frames"), BY_HAND)
def test_a_pass_costs_what_was_computed_by_hand(
    name: str, size: tuple[int, int], frames: int
) -> None:
    tokens, tflop = BY_HAND[name, size, frames]
    once = measure_pass(card_of(name), Video(frames=frames, size=size))
    words = 2 * 30 * 2 * 512 * 3072**2 if name == SMALL_WAN else 0
    assert once.tokens == tokens
    assert float(f"{(once.flop - words) / 1e12:.2g}") == tflop


def test_attention_is_counted_as_its_two_products() -> None:
    """CogVideoX attends over words and tokens together, in 42 blocks of 3072 channels."""
    once = measure_pass(card_of(COGVIDEOX), Video(frames=9, size=(480, 720)))
    assert once.attention_flop == 42 * 2 * 2 * (2700 + 226) ** 2 * 3072
    assert once.training_flop(checkpointing=False) == 2 * once.flop + once.attention_flop


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="multiples of 16"):
        measure_pass(card_of(COGVIDEOX), Video(frames=9, size=(490, 720)))
    with pytest.raises(ModelError, match="learned places for 720x480 alone"):
        measure_pass(card_of("zai-org/CogVideoX-5b-I2V"), Video(frames=9, size=(480, 480)))
    with pytest.raises(ModelError, match="8 frames do not fit"):
        measure_pass(card_of(SMALL_WAN), Video(frames=8, size=(704, 1280)))


@pytest.mark.parametrize("name", ["zai-org/CogVideoX-5b-I2V", "Lightricks/LTX-Video"])
def test_an_adapter_has_the_parameters_that_peft_makes(name: str) -> None:
    card = card_of(name)
    with torch.device("meta"):
        base = open_empty(card, layers=1)
        parameters = [p.numel() for _, p in add_lora(base, rank=8, alpha=8, seed=0)]
    assert sum(parameters) * card.layers == count_adapter(card, rank=8)


def test_memory_is_that_of_tensors_that_live_together() -> None:
    def compute() -> torch.Tensor:
        first = torch.ones(1000)
        second = first + 1  # 8,000 bytes
        del first
        third = second * 2  # no more, as the first is gone
        del second
        return third[:10] + third[10:20]  # less; views take none

    assert _peak(compute) == 8000
    kept = torch.ones(1000)
    assert _peak(lambda: kept.view(10, 100) + 1) == 4000  # what was there does not count


def test_checkpointing_keeps_the_inputs_of_all_blocks() -> None:
    """By hand: bf16 tokens of 5120 channels, one more for each block."""
    card, video = card_of(LARGE_WAN), Video(frames=9, size=(480, 832))
    peaks = [
        _update_peak(partial(open_empty, card, weights="bf16", layers=layers), video, 64, True)
        for layers in (2, 3, 4)
    ]
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1] == 4680 * 5120 * 2


def test_memory_is_of_weights_adapter_and_what_comes_and_goes() -> None:
    card, video = card_of("Lightricks/LTX-Video"), Video(frames=9, size=(480, 704))
    found = measure_memory(card, video, rank=64)
    train, predict = found["train"], found["predict"]
    assert train.denoiser == predict.denoiser == 2 * card.figures["transformer_parameters"]
    assert (train.adapter, predict.adapter) == (20 * count_adapter(card, rank=64), 0)
    # The text encoder is there first, alone, and takes the most of so small a model.
    assert train.total == train.text == 2 * card.figures["text_encoder_parameters"]
    assert predict.total == predict.denoiser + predict.encoders + predict.coding
    block = sum(p.numel() for p in list_blocks(open_on_meta(card))[0].parameters())
    assert found["offload"].denoiser == predict.denoiser - 2 * (card.layers - 2) * block
    assert found["offload"].coding == predict.coding
    found = measure_memory(card, video, rank=64, weights="nf4", checkpointing=False)
    assert found["train"].denoiser == pytest.approx(train.denoiser * 0.5625 / 2)
    assert found["train"].activations > 5 * train.activations
    assert found["predict"].denoiser == predict.denoiser


@pytest.mark.parametrize(
    "name",
    [name if name == "pocket" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_the_figures_of_a_card_are_what_is_computed(name: str) -> None:
    """If not: `python -m fewshot_rt.benchmarks.cards`. PyTorch may hold tensors otherwise."""
    card = card_of(name)
    computed = make_figures(card)
    assert card.figures.keys() == computed.keys()
    for key, value in computed.items():
        tolerance = 0.03 if key.endswith("_gb") else 1e-3 if key.endswith("flop") else 0
        assert card.figures[key] == pytest.approx(value, rel=tolerance, abs=0.01), key
    assert len(list_blocks(open_on_meta(card))) == card.layers


def test_gpus_hold_with_headroom() -> None:
    gpu = GPUS[0]
    assert gpu.holds(21_800_000_000)
    assert not gpu.holds(23_000_000_000)
    assert gpu.seconds(165e12) == pytest.approx(2.5)


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, write_noise_pairs: Any
) -> Any:
    """Type commands beside `pairs`, with no network and an empty cache of the Hub."""
    from huggingface_hub import constants

    from fewshot_rt.cli.main import main

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    write_noise_pairs(tmp_path / "pairs", (32, 48))

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fewshot-rt", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), *capsys.readouterr()

    return run


class TestCommands:
    """`bases`, and `check --base` of a known one."""

    def test_bases_lists_names_that_can_be_typed(self, typed: Any) -> None:
        status, out, err = typed("bases", "--json")
        assert status == 0
        rows = err.splitlines()
        assert [row.split()[0] for row in rows[1 : len(NAMES) + 1]] == NAMES
        assert all(len(row) <= 80 for row in rows)
        assert "CogVideoX License: zai-org/CogVideoX-5b-I2V" in err
        found = {base["name"]: base for base in json.loads(out)["bases"]}
        assert found["pocket"]["is_here"]
        assert found[COGVIDEOX]["size"] == "1360x768"
        assert not found[COGVIDEOX]["is_here"]

    def test_check_reckons_for_a_known_base(self, typed: Any) -> None:
        words = ["check", "pairs", "--base", COGVIDEOX.lower(), "--size", "720x480", "--steps", 100]
        status, out, err = typed(*words, "--json")
        assert status == 0, err
        found = json.loads(out)
        assert found["transition"]["kind"] == "discrete"
        costs = found["costs"]
        assert (costs["tokens"], costs["frames"], costs["size"]) == (2700, 9, "720x480")
        (h100,) = (gpu for gpu in costs["gpus"] if gpu["name"] == "H100")
        assert h100["step_seconds"] == pytest.approx(costs["step_tflop"] / 989 / 0.4)
        assert costs["memory_gb"]["train"]["denoiser"] == pytest.approx(2 * 5.5716, rel=1e-4)
        assert "5.6B parameters, CogVideoX License, not on this machine" in err
        assert "100 steps" in err
        assert "This machine has no GPU" in err

    @pytest.mark.parametrize(
        ("name", "memory_gb", "verdict"),
        [("NVIDIA H100 80GB HBM3", 85, "This GPU will do"), ("Old", 6, "This GPU will not do")],
    )
    def test_check_judges_the_gpu_that_is_there(
        self,
        typed: Any,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        memory_gb: float,
        verdict: str,
    ) -> None:
        peak = 989.0 if "H100" in name else float("nan")
        monkeypatch.setattr("fewshot_rt.cli.costs.this_gpu", lambda: GPU(name, peak, memory_gb))
        status, out, err = typed("check", "pairs", "--base", "Lightricks/LTX-Video", "--json")
        assert status == 0, err
        assert verdict in err
        (gpu,) = json.loads(out)["costs"]["gpus"]
        assert (gpu["step_seconds"] is None) == (name == "Old")

    def test_check_refuses_a_size_that_does_not_fit(self, typed: Any) -> None:
        status, _, err = typed("check", "pairs", "--base", COGVIDEOX, "--size", "500")
        assert status == 1
        assert "multiples of 16" in err

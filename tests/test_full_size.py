"""Known bases at their full size and depth, without weights: opened, and captured as one graph.

The configurations are those of the Hub; the networks are made on the meta device or of fake
tensors. References: what diffusers' classes and the families themselves require.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionModel

from fewshot_rt.bases import open_base
from fewshot_rt.bases.wan import Experts, WanBase, WanDenoiser
from fewshot_rt.cards import Card, open_empty, read_cards
from fewshot_rt.costs import open_on_meta
from fewshot_rt.export.program import capture
from fewshot_rt.roles import make_roles, make_signatures

CARDS = read_cards()
# Attention in a block: to itself, to the prompt, and to the image. CogVideoX has one for all.
ATTENTIONS = {"cogvideox": 1, "ltx": 2, "wan": 2, "pocket": 2}


def write_folder(card: Card, folder: Path) -> None:
    """Write the configurations of a card as the Hub has them, without weights."""
    parts = {"transformer": card.transformer, "vae": card.vae}
    if card.experts == 2:
        parts["transformer_2"] = card.transformer
    if card.image_encoder:
        parts["image_encoder"] = card.image_encoder["config"]
    for part, config in parts.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(dict(config)))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(card.scheduler)))
    (folder / "model_index.json").write_text(json.dumps(dict(card.pipeline)))


@pytest.fixture
def weightless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have models opened from their configurations alone, on the meta device."""

    def open_diffusers(cls: Any, folder: Path, subfolder: str = "", **_: Any) -> Any:
        config = json.loads((Path(folder) / subfolder / "config.json").read_text())
        with torch.device("meta"):
            return cls.from_config({k: v for k, v in config.items() if k[0] != "_"})

    def open_transformers(cls: Any, folder: Path, **_: Any) -> Any:
        with torch.device("meta"):
            return cls(cls.config_class.from_pretrained(folder))

    monkeypatch.setattr("fewshot_rt.device.pick_device", str)
    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(open_diffusers))
    monkeypatch.setattr(CLIPVisionModel, "from_pretrained", classmethod(open_transformers))


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize("card", CARDS[1:], ids=lambda card: card.name)
def test_the_family_opens_what_is_on_the_hub(card: Card, tmp_path: Path) -> None:
    """Its checks of scheduler and sizes pass, and the card says what the base says."""
    write_folder(card, tmp_path)
    base, empty = open_base(str(tmp_path), device="meta"), open_on_meta(card)
    assert type(base) is type(empty)
    assert base.geometry == empty.geometry
    assert base.geometry.native == card.native
    assert base.transition == card.transition
    counts = [sum(p.numel() for p in each.denoiser().parameters()) for each in (base, empty)]
    assert counts[0] == counts[1] * card.experts == card.figures["transformer_parameters"]
    assert base.networks().keys() == empty.networks().keys()


def check_capture(base: Any, card: Card, *, attentions: int) -> None:
    """Capture the denoiser for every batch from 1 to 2, at the native size."""
    height, width = card.native
    latents = base.geometry.latent_shape(frames=card.transition.frames, height=height, width=width)
    prompt = {"prompt": torch.empty(1, *card.prompt)}
    signatures = make_signatures(base, prompt, latents=latents, size=card.native, batch=2)
    role = make_roles(base, signatures)["denoiser"]
    program = capture(role, signatures["denoiser"], role="denoiser")
    nodes = list(program.exported.graph.nodes)
    found = [node for node in nodes if "scaled_dot_product" in str(node.target)]
    assert len(found) == attentions
    (output,) = program.exported.graph.output_node().args[0]
    batch, *rest = output.meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert tuple(rest) == latents
    weights = sum(p.numel() for p in base.denoiser().parameters())
    assert program.size_bytes == pytest.approx(4 * weights, rel=0.01)


def attentions_in(card: Card) -> int:
    return card.layers * (ATTENTIONS[card.family] + (card.image_encoder is not None))


# One of each transformer; of two experts, see below.
DISTINCT = {
    repr(sorted(card.transformer.items())): card for card in CARDS if card.experts == 1
}.values()


@pytest.mark.slow
@pytest.mark.parametrize("card", DISTINCT, ids=lambda card: card.name)
def test_the_denoiser_is_captured_at_full_size_and_depth(card: Card) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        check_capture(open_empty(card), card, attentions=attentions_in(card))


@pytest.mark.slow
def test_two_experts_are_captured_as_one_graph() -> None:
    (card,) = (card for card in CARDS if card.experts == 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        base, other = (open_empty(card) for _ in range(2))
        assert isinstance(base, WanBase)
        one, two = (each.denoiser().get_submodule("transformer") for each in (base, other))
        base._denoiser = WanDenoiser(Experts(one, two, boundary=card.pipeline["boundary_ratio"]))
        check_capture(base, card, attentions=2 * attentions_in(card))

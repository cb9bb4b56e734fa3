"""What is known of bases without their weights: a file of facts each, in `bases/cards/`.

The facts are those of the models' own folders in diffusers' layout: what `model_index.json` and the
`config.json` of each part say, as far as it differs from the defaults of diffusers' classes. Each
card names where they were read; what could not be checked is listed as unverified.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import INDEX_FILE
from .transition import Transition

if TYPE_CHECKING:
    from .base import Base

PACKAGE = Path(__file__).parent
CARDS = PACKAGE / "bases" / "cards"
BOX = "pocket"

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Card:
    """Facts of one base.

    name: on the Hub; also: other names, of models of the very same sizes. native: (height, width),
    and transition: what is taken unless others are given. prompt: (tokens, width) of an embedded
    prompt. text_encoder, image_encoder: their class and parameters. sources: where the
    facts were read; unverified: keys whose values were not found there, or differ between them.
    figures: what `benchmarks.cards` computed, so that a table of all bases needs no PyTorch.
    """

    name: str
    also: tuple[str, ...]
    family: str
    licence: str
    native: tuple[int, int]
    transition: Transition
    pipeline: Config
    scheduler: Config
    transformer: Config
    vae: Config
    text_encoder: Config | None
    image_encoder: Config | None
    prompt: tuple[int, int]
    sources: tuple[str, ...]
    unverified: tuple[str, ...]
    figures: Config

    @property
    def experts(self) -> int:
        """How many transformers there are; each answers for its own range of times."""
        return 2 if self.pipeline.get("boundary_ratio") else 1

    @property
    def weights(self) -> str:
        """How the denoiser is kept on a GPU: "bf16", or "fp32" where that is small."""
        return "fp32" if self.name == BOX else "bf16"

    @property
    def layers(self) -> int:
        """How many blocks a transformer has."""
        return int(self.transformer["num_layers"])

    def is_here(self) -> bool:
        """Say whether the weights are on this machine, without asking the network."""
        if self.name == BOX:
            return True
        from huggingface_hub import try_to_load_from_cache

        found = (try_to_load_from_cache(name, INDEX_FILE) for name in (self.name, *self.also))
        folders = [Path(path).parent for path in found if isinstance(path, str)]
        return any(list(folder.glob("transformer/*.safetensors")) for folder in folders)


@cache
def read_cards() -> tuple[Card, ...]:
    """Read all cards, the one in the box first, then by family and number of parameters."""
    cards = [_read(path) for path in CARDS.glob("*.json")]
    return tuple(
        sorted(cards, key=lambda card: (card.name != BOX, card.family, _size(card), card.name))
    )


def find_card(name: str) -> Card | None:
    """Find the card of a base by a name on the Hub, in any case; None if there is none.

    A revision behind an @ does not count.
    """
    wanted = name.partition("@")[0].lower()
    for card in read_cards():
        if wanted in [known.lower() for known in (card.name, *card.also)]:
            return card
    return None


def open_empty(
    card: Card, *, layers: int | None = None, weights: str = "fp32", coder: str | None = None
) -> "Base":
    """Make a base of a card's sizes with no weights: on the meta device, or of fake tensors.

    The caller chooses by opening it under `torch.device("meta")` or a `FakeTensorMode`. Of two
    experts, which are alike, there is one. layers: fewer blocks than the card has. weights: "fp32"
    or "bf16", of the transformer; coder: of the autoencoder where the family's may be in bf16, the
    same as the transformer's unless given.
    """
    changes = {} if layers is None else {"num_layers": layers}
    with _weights(weights):
        transformer = _empty(card.transformer, changes)
    with _weights("fp32" if card.family in FP32_CODERS else coder or weights):
        autoencoder = None if card.name == BOX else _empty(card.vae, {})
    base: Base = _FAMILIES[card.family](card, transformer, autoencoder)
    return base


def _read(path: Path) -> Card:
    values = json.loads(path.read_text(encoding="utf-8"))
    if folder := values.pop("folder", None):
        place = PACKAGE / folder
        values["native"] = _json(place / INDEX_FILE)["native"]
        values |= {part: _json(place / part / "config.json") for part in ("transformer", "vae")}
    values["transition"] = Transition(**values["transition"])
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Card(**fields)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _size(card: Card) -> int:
    return int(card.figures.get("transformer_parameters", 0))


def _empty(config: Config, changes: Config) -> Any:
    """Make a model of a class of diffusers; what a card leaves out, the class knows."""
    import diffusers

    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return getattr(diffusers, config["_class_name"]).from_config({**plain, **changes})


@contextmanager
def _weights(kind: str) -> Iterator[None]:
    """Make new weights in fp32 or bf16."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype({"fp32": torch.float32, "bf16": torch.bfloat16}[kind])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _prompt(card: Card) -> Any:
    import torch

    return torch.zeros(1, *card.prompt)


def _cogvideox(card: Card, transformer: Any, autoencoder: Any) -> Any:
    from .bases.cogvideox import CogVideoXBase
    from .schedule import Schedule

    return CogVideoXBase(
        transformer=transformer,
        autoencoder=autoencoder,
        schedule=Schedule(kind="v"),
        encode_prompt=lambda _: _prompt(card),
        name=card.name,
        revision="",
    )


def _wan(card: Card, transformer: Any, autoencoder: Any) -> Any:
    from .bases.wan import WanBase
    from .schedule import Schedule

    return WanBase(
        transformer=transformer,
        autoencoder=autoencoder,
        image_encoder=_empty_tower(card.image_encoder) if card.image_encoder else None,
        schedule=Schedule(kind="flow", shift=card.scheduler["flow_shift"]),
        is_first_clean=bool(card.pipeline.get("expand_timesteps")),
        encode_prompt=lambda _: _prompt(card),
        name=card.name,
        revision="",
    )


def _empty_tower(config: Config) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from .bases.wan import ImageEncoder

    sizes = config["config"]
    return ImageEncoder(CLIPVisionModel(CLIPVisionConfig(**sizes)), side=sizes["image_size"])


def _ltx(card: Card, transformer: Any, autoencoder: Any) -> Any:
    from .bases.ltx import LTXBase
    from .schedule import Schedule

    return LTXBase(
        transformer=transformer,
        autoencoder=autoencoder,
        schedule=Schedule(kind="flow"),
        encode_prompt=lambda _: _prompt(card),
        is_causal=not card.scheduler["use_dynamic_shifting"],
        name=card.name,
        revision="",
    )


def _pocket(card: Card, transformer: Any, _: Any) -> Any:
    import torch

    from .autoencoder import AutoencoderConfig, TinyVideoAutoencoder
    from .bases.pocket import PocketBase, PromptTable

    return PocketBase(
        transformer=transformer,
        autoencoder=TinyVideoAutoencoder(AutoencoderConfig.from_dict(dict(card.vae))),
        prompts=PromptTable(("",), torch.empty(1, card.prompt[1])),
        index={"name": card.name, "revision": "", "native": card.native},
    )


# Families whose autoencoder stays in fp32 on a GPU, too.
FP32_CODERS = ("wan",)
_FAMILIES = {"cogvideox": _cogvideox, "wan": _wan, "ltx": _ltx, "pocket": _pocket}

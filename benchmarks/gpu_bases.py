"""The bases that `make gpu` measures: at full size, or shrunk so that a CPU can rehearse.

Axes: N heads, L tokens of the queries, K tokens of the keys, D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.overrides import TorchFunctionMode

from fewshot_rt.cards import BOX, Card, find_card, open_empty, read_cards
from fewshot_rt.costs import Pass, Video, make_inputs, measure_pass, predict
from fewshot_rt.errors import ConfigError, unknown

# Measured unless others are named; the paper's own base comes first.
PAPER_BASE = "zai-org/CogVideoX1.5-5B-I2V"
PAPER_SIZE = (480, 720)
MEASURED = (
    PAPER_BASE,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "Lightricks/LTX-Video",
)
SHRUNK_SIZE = (64, 96)
TEXT = 64  # width of embedded words in a shrunk base
# What a shrunk base has instead of its own sizes; heads are as wide as they were.
_SHRUNK_TRANSFORMER: dict[str, dict[str, Any]] = {
    "cogvideox": {
        "text_embed_dim": TEXT,
        "max_text_seq_length": 8,
        "sample_height": SHRUNK_SIZE[0] // 8,
        "sample_width": SHRUNK_SIZE[1] // 8,
    },
    "wan": {"text_dim": TEXT, "ffn_dim": 256},
    "ltx": {"caption_channels": TEXT},
}
_SHRUNK_CODER: dict[str, dict[str, Any]] = {
    "cogvideox": {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2},
    "wan": {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1},
    "ltx": {
        "block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
    },
}
_SHRUNK_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 32,
    "image_size": 224,
}
_HEADS, _LAYERS = 2, 4
_HEAD_WIDTHS = {"cogvideox": 64, "wan": 128, "ltx": 64}  # unless the card says so


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A base to measure. size: (H, W) of its pictures; frames: T that its answers take."""

    card: Card
    size: tuple[int, int]
    frames: int = 9


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """Sizes of an attention: heads N of width D, length L and key_length K."""

    heads: int
    width: int
    length: int
    key_length: int

    @property
    def flop(self) -> int:
        """Count queries times keys, and what comes of them times values."""
        return 4 * self.heads * self.length * self.key_length * self.width

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.width}, {self.length} x {self.key_length}"


def find_subjects(names: Sequence[str], *, is_rehearsal: bool) -> tuple[Subject, ...]:
    """Find bases by name, shrunk for a rehearsal.

    Raises: ConfigError if one is not known.
    """
    known = [card.name for card in read_cards() if card.name != BOX]
    subjects = []
    for name in names:
        card = find_card(name)
        if card is None or card.name == BOX:
            raise ConfigError(unknown("base", name, known))
        size = PAPER_SIZE if card.name == PAPER_BASE else card.native
        subjects.append(Subject(card=card, size=size))
    return tuple(shrink(subject) for subject in subjects) if is_rehearsal else tuple(subjects)


def shrink(subject: Subject) -> Subject:
    """Give a base of the same kind with few, narrow layers, and small pictures."""
    card = subject.card
    width = _HEADS * card.transformer.get("attention_head_dim", _HEAD_WIDTHS[card.family])
    changes = _SHRUNK_TRANSFORMER[card.family] | {
        "num_attention_heads": _HEADS,
        "num_layers": _LAYERS,
    }
    tower = card.image_encoder and {**card.image_encoder, "config": _SHRUNK_TOWER}
    if tower:
        changes |= {"image_dim": _SHRUNK_TOWER["hidden_size"], "added_kv_proj_dim": width}
    if card.family == "ltx":
        changes |= {"cross_attention_dim": width}
    words = changes.get("max_text_seq_length", card.prompt[0])
    small = replace(
        card,
        transformer={**card.transformer, **changes},
        vae={**card.vae, **_shrunk_coder(card)},
        image_encoder=tower,
        prompt=(words, TEXT),
        native=SHRUNK_SIZE,
    )
    return replace(subject, card=small, size=SHRUNK_SIZE)


def _shrunk_coder(card: Card) -> dict[str, Any]:
    """Give an autoencoder's own number of levels few channels and layers each."""
    changes = dict(_SHRUNK_CODER[card.family])
    for name, value in changes.items():
        if isinstance(value, tuple) and name in card.vae:
            changes[name] = value[:1] * len(card.vae[name])
    return changes


def with_blocks(card: Card, count: int) -> Card:
    """Give a card of so many blocks."""
    return replace(card, transformer={**card.transformer, "num_layers": count})


def count_pass(card: Card, video: Video) -> Pass:
    """Count as `measure_pass` does; of all blocks, which are alike, two are looked at.

    Raises: ModelError if the base does not take such a video.
    """
    one, two = (measure_pass(with_blocks(card, count), video) for count in (1, 2))
    more = card.layers - 1
    return Pass(
        tokens=one.tokens,
        flop=one.flop + more * (two.flop - one.flop),
        attention_flop=one.attention_flop + more * (two.attention_flop - one.attention_flop),
    )


def list_shapes(card: Card, video: Video) -> tuple[Shape, ...]:
    """List the different attentions of a base's blocks for one video, as torch is called for them.

    Raises: ModelError if the base does not take such a video.
    """
    import torch

    with torch.device("meta"), torch.no_grad():
        base = open_empty(with_blocks(card, 1))
        inputs = make_inputs(base, replace(video, batch=1))
        with _Attentions() as seen:
            predict(base, inputs)
    return tuple(dict.fromkeys(seen.shapes))


class _Attentions(TorchFunctionMode):
    """Notes the sizes of every attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Shape] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            given = dict(zip(("query", "key"), args, strict=False)) | kwargs
            query, key = given["query"], given["key"]
            _, heads, length, width = query.shape
            self.shapes.append(
                Shape(heads=heads, width=width, length=length, key_length=key.shape[2])
            )
        return func(*args, **kwargs)

"""Settings of training; apart from it, so that the command line shows them without torch."""

from dataclasses import dataclass, fields, replace

from .config import option
from .errors import ConfigError

OBJECTIVES = ("onestep", "grid", "diffusion")
PRECISIONS = ("auto", "fp32", "bf16")
FEW_BITS = ("int8", "nf4")  # kinds of weights
WEIGHTS = ("auto", "fp32", "bf16", *FEW_BITS)
SUITED = "  [default: what suits the base]"


@dataclass(frozen=True, kw_only=True)
class Suited:
    """Settings of training that depend on the base; see `TrainConfig` for what they are."""

    batch: int
    rate: float
    rank: int
    alpha: int
    clip: float
    checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `fewshot-rt train`."""

    base: str = option("pocket", "base model: see `fewshot-rt bases`, or a folder")
    size: str | None = option(
        None, "what the model sees: WIDTHxHEIGHT, or one side  [default: the base's own]"
    )
    shots: int | None = option(None, "use only this many of the pairs, drawn by the seed")
    hold_out: int | None = option(
        None,
        "pairs that are kept out of training, to try numbers of denoising steps on; 0 keeps none, "
        "and tries on test pairs alone  [default: none if there are test pairs, or others that "
        "--shots leaves; else a fifth; of 2 or 3 none, but a second training goes without one]",
    )
    objective: str = option(
        "onestep",
        "what is learned: one step from zero noise, a grid of few steps, or diffusion as the paper "
        "has it",
        choices=OBJECTIVES,
    )
    grid_steps: int = option(4, "steps that the objective grid is made for")
    start: float = option(
        1.0,
        "time that the objective onestep begins at: 1 is pure noise, where its zeros count as "
        "noise",
    )
    pixel_loss: float = option(
        0.0, "weight of the error in pixels beside that in latents, for onestep with a tiny decoder"
    )
    steps: int = option(250, "updates of the adapter")
    minutes: float | None = option(
        None, "stop after this time of updates, even before the steps are done"
    )
    batch: int | None = option(None, "videos in an update" + SUITED)
    rate: float | None = option(None, "learning rate" + SUITED)
    rank: int | None = option(None, "rank of the adapter" + SUITED)
    alpha: int | None = option(
        None, "scale of the adapter; the update counts alpha / rank" + SUITED
    )
    warmup: int = option(20, "steps over which the learning rate comes up")
    clip: float | None = option(None, "largest norm of the gradient" + SUITED)
    average: float = option(
        0.95, "weight of the past in the averaged adapter; 0 keeps the last one"
    )
    augment: str = option("auto", "variants of pairs: auto, none, or flips,turns,crops,colours")
    variants: int = option(16, "variants of each pair, the pair itself included")
    seed: int = option(42, "random seed")
    precision: str = option("auto", "arithmetic of training", choices=PRECISIONS)
    weights: str = option(
        "auto", "how the frozen base is kept; int8 and nf4 for small GPUs", choices=WEIGHTS
    )
    vae: str | None = option(
        None,
        "file of a tiny autoencoder's weights (TAEHV) in place of the base's own: faster, a little "
        "less exact",
    )
    checkpointing: bool | None = option(
        None, "compute activations twice instead of keeping them: less memory, more time" + SUITED
    )
    device: str = option("auto", "auto, cpu or cuda")
    save_seconds: float = option(30.0, "time between saved states, from which --resume goes on")

    def __post_init__(self) -> None:
        for name in ("steps", "grid_steps", "batch", "rank", "alpha", "variants", "shots"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("minutes", "rate", "clip", "save_seconds"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0 < self.start <= 1:
            raise ConfigError(f"start must be above 0 and at most 1, not {self.start}")
        for name in ("warmup", "seed", "pixel_loss", "hold_out"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must not be below 0, but is {getattr(self, name)}")
        if not 0 <= self.average < 1:
            raise ConfigError(f"average must be from 0 to below 1, not {self.average}")
        self.pixels((1, 1))

    def suited(self, base: Suited) -> Suited:
        """Give what was given, and the base's own where nothing was."""
        given = {item.name: getattr(self, item.name) for item in fields(Suited)}
        return replace(base, **{name: v for name, v in given.items() if v is not None})

    def pixels(self, native: tuple[int, int]) -> tuple[int, int]:
        """Give (height, width) of what the model sees; a base's own where no size was given.

        Raises: ConfigError if the size cannot be read.
        """
        if self.size is None:
            return native
        sides = self.size.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise ConfigError(f"size must be WIDTHxHEIGHT or one number, not {self.size!r}")
        return int(sides[-1]), int(sides[0])

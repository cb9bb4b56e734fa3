"""Settings of training; apart from it, so that the command line shows them without torch."""

from dataclasses import dataclass

from .config import option
from .errors import ConfigError

OBJECTIVES = ("onestep", "diffusion")
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `fewshot-rt train`."""

    base: str = option("pocket", "base model: a name, or a folder that `pretrain` wrote")
    shots: int | None = option(None, "use only this many of the pairs, drawn by the seed")
    objective: str = option(
        "onestep", "what is learned: one step from zero noise, or diffusion", choices=OBJECTIVES
    )
    steps: int = option(250, "updates of the adapter")
    minutes: float | None = option(
        None, "stop after this time of updates, even before the steps are done"
    )
    batch: int = option(4, "videos in an update")
    rate: float | None = option(None, "learning rate  [default: what suits the base]")
    rank: int = option(32, "rank of the adapter")
    alpha: int = option(32, "scale of the adapter; the update counts alpha / rank")
    warmup: int = option(20, "steps over which the learning rate comes up")
    clip: float = option(1.0, "largest norm of the gradient")
    average: float = option(
        0.95, "weight of the past in the averaged adapter; 0 keeps the last one"
    )
    augment: str = option("auto", "variants of pairs: auto, none, or flips,turns,crops,colours")
    variants: int = option(16, "variants of each pair, the pair itself included")
    seed: int = option(42, "random seed")
    precision: str = option("auto", "arithmetic of training", choices=PRECISIONS)
    device: str = option("auto", "auto, cpu or cuda")
    save_seconds: float = option(30.0, "time between saved states, from which --resume goes on")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "alpha", "variants", "shots"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("minutes", "rate", "clip", "save_seconds"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be below 0, but is {getattr(self, name)}")
        if not 0 <= self.average < 1:
            raise ConfigError(f"average must be from 0 to below 1, not {self.average}")

"""Settings of distillation; apart from it, so that the command line shows them without torch."""

from dataclasses import dataclass

from .config import option
from .errors import ConfigError

REPORT_FILE = "distilled.json"


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of `fewshot-rt distill`."""

    steps: int = option(4, "denoising steps that are to be enough")
    teacher_steps: int = option(32, "denoising steps of the teacher")
    draws: int = option(2, "noises that every image is walked from")
    updates: int = option(200, "updates of the adapter")
    rate: float | None = option(None, "learning rate  [default: a quarter of the training's]")
    seed: int = option(0, "random seed")
    device: str = option("auto", "auto, cpu or cuda")

    def __post_init__(self) -> None:
        for name in ("steps", "draws", "updates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.teacher_steps <= self.steps:
            raise ConfigError(
                f"a teacher of {self.teacher_steps} steps has nothing to teach one of {self.steps}."
            )
        if self.rate is not None and not self.rate > 0:
            raise ConfigError(f"rate must be above 0, not {self.rate}")

"""Settings of pretraining; apart from it, so that the command line shows them without torch."""

from dataclasses import dataclass

from .config import option
from .errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of `fewshot-rt pretrain`."""

    name: str = option("pocket", "name of the base, kept in its files and in every adapter")
    minutes: float = option(60.0, "time for the whole run, resumed parts included")
    init: str | None = option(None, "base whose weights are the first, in place of random ones")
    autoencoder: str | None = option(None, "base whose autoencoder is taken; none is trained then")
    autoencoder_share: float = option(0.15, "share of the time that trains the autoencoder")
    events: str | None = option(None, "only these events, with commas; a first part for hard ones")
    batch: int = option(32, "clips a step at half size; a quarter of it at native size")
    native: int = option(128, "height and width of the images")
    repeats: int = option(4, "steps that a clip is drawn for; making clips takes time too")
    half_share: float = option(0.65, "share of the denoiser's time at half size")
    rate: float = option(0.003, "learning rate of the denoiser")
    autoencoder_rate: float = option(0.001, "learning rate of the autoencoder")
    silent_words: float = option(0.1, "share of clips whose event is not named")
    zero_noise: float = option(0.5, "share of clips at time 1 without noise: where onestep starts")
    pure_noise: float = option(0.1, "share of clips at time 1 with noise")
    layers: int = option(6, "transformer blocks")
    heads: int = option(3, "attention heads of 64")
    seed: int = option(0, "random seed")
    device: str = option("cpu", "cpu or cuda")
    save_minutes: float = option(5.0, "time between checkpoints and panels")
    compile: bool = option(True, "compile the training step")

    def __post_init__(self) -> None:
        shares = ("autoencoder_share", "half_share", "silent_words", "zero_noise", "pure_noise")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.zero_noise + self.pure_noise > 1:
            raise ConfigError("zero_noise and pure_noise must be 1 at most, together")
        if self.init and self.autoencoder:
            raise ConfigError("init takes a base's autoencoder too: give only one of the two")
        for name in ("minutes", "rate", "autoencoder_rate", "save_minutes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.batch < 4 or min(self.repeats, self.layers, self.heads) < 1 or self.seed < 0:
            raise ConfigError(
                "batch must be at least 4, repeats, layers and heads 1, and the seed 0"
            )
        if self.native < 32 or self.native % 16:
            raise ConfigError(f"native must be a multiple of 16 from 32 on, not {self.native}")

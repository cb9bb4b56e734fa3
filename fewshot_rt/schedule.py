"""The noise schedule: one object for flow matching and v-prediction, for training and for sampling.

Arrays are NumPy or torch: a bundle samples without importing torch. Axes: B batch.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import ConfigError, unknown

Array = Any  # numpy.ndarray or torch.Tensor; a time may also be a plain number

COSINE_POWER = (*(math.cos(math.pi / 2 * i / 1000) ** 2 for i in range(1, 1000)), 0.0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a sample turns into noise: x_t = a(t) clean + b(t) noise, t in [0, 1], 1 is pure noise.

    kind: "flow" (a = 1 - t, b = t, the model predicts noise - clean) or
        "v" (a² + b² = 1, the model predicts a noise - b clean).
    shift: moves the sampling times of "flow" towards the noise; 1 leaves them even.
    signal_power: a² at N even times from 1/N to 1, for "v" only; linear between them. Its last
        value must be 0 (zero terminal SNR). The default is a = cos(pi t / 2).

    Source: Lipman et al. 2023, eq. 20 (flow); Salimans & Ho 2022, sec. 2.4 (v); Esser et al. 2024,
    eq. 23 (shift); Lin et al. 2024 (zero terminal SNR, trailing times).
    """

    kind: str = "flow"
    shift: float = 1.0
    signal_power: tuple[float, ...] = COSINE_POWER

    def __post_init__(self) -> None:
        if self.kind not in ("flow", "v"):
            raise ConfigError(unknown("schedule", self.kind, ("flow", "v")))
        if self.shift <= 0:
            raise ConfigError(f"schedule shift must be above 0, not {self.shift}")
        if abs(self.signal_power[-1]) > 1e-8:
            last = self.signal_power[-1]
            raise ConfigError(f"the last signal power must be 0 (zero terminal SNR), not {last}")

    def coefficients(self, time: Array) -> tuple[Array, Array]:
        """Give a(t) and b(t).

        Shapes: time, a, b [B], or numbers.
        Raises: ValueError if a time is outside [0, 1].
        """
        # bfloat16 has no NumPy type.
        is_torch = hasattr(time, "detach")
        numbers = time.detach().cpu().double().numpy() if is_torch else np.asarray(time)
        if not np.all((numbers >= 0) & (numbers <= 1)):
            raise ValueError(f"time must be in [0, 1], got {time}")
        if self.kind == "flow":
            return 1 - time, time
        table = (1.0, *self.signal_power)
        position = numbers.astype(np.float64) * (len(table) - 1)
        power = np.interp(position, np.arange(len(table)), table)
        return _like(time, power**0.5), _like(time, (1 - power) ** 0.5)

    def noise(self, clean: Array, noise: Array, time: Array) -> Array:
        """Mix a clean sample with noise: x_t = a(t) clean + b(t) noise.

        Shapes: clean, noise, result [B, ...]; time [B] or a number.
        """
        a, b = self._broadcast(time, clean)
        return a * clean + b * noise

    def target(self, clean: Array, noise: Array, time: Array) -> Array:
        """Give what the model should predict at this time.

        Shapes: clean, noise, result [B, ...]; time [B] or a number.
        """
        if self.kind == "flow":
            return noise - clean
        a, b = self._broadcast(time, clean)
        return a * noise - b * clean

    def split(self, noisy: Array, prediction: Array, time: Array) -> tuple[Array, Array]:
        """Recover the clean sample and the noise from one prediction.

        Shapes: noisy, prediction [B, ...]; time [B] or a number.
        Raises: ValueError if time is outside [0, 1].
        """
        a, b = self._broadcast(time, noisy)
        if self.kind == "flow":
            return noisy - b * prediction, noisy + a * prediction
        return a * noisy - b * prediction, b * noisy + a * prediction

    def step(self, noisy: Array, prediction: Array, time: Array, next_time: Array) -> Array:
        """Go from one time to the next along the predicted direction (Euler; DDIM for "v").

        Shapes: noisy, prediction, result [B, ...]; times [B] or numbers.
        Source: Song et al. 2021, eq. 12 with sigma = 0.
        """
        clean, noise = self.split(noisy, prediction, time)
        return self.noise(clean, noise, next_time)

    def times(self, steps: int) -> tuple[float, ...]:
        """List the steps + 1 times of a sampler: first exactly 1, last exactly 0, trailing spacing.

        Raises: ValueError if steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, not {steps}")
        even = (1 - i / steps for i in range(steps + 1))
        return tuple(self.shift * t / (self.shift * t + (1 - t)) for t in even)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values; the cosine table, being the default, is left out."""
        values = asdict(self)
        if self.kind == "flow" or self.signal_power == COSINE_POWER:
            del values["signal_power"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Schedule":
        """Make a schedule from what `to_dict` gave."""
        values = dict(values)
        if "signal_power" in values:
            values["signal_power"] = tuple(values["signal_power"])
        return cls(**values)

    def _broadcast(self, time: Array, like: Array) -> tuple[Array, Array]:
        """Give a and b in the type of a sample, shaped to multiply it."""
        if isinstance(time, int | float):
            return self.coefficients(time)
        shape = (-1,) + (1,) * (like.ndim - 1)
        a, b = self.coefficients(time)
        return _like(like, a).reshape(shape), _like(like, b).reshape(shape)


def _like(reference: Array, values: Array) -> Array:
    """Give values in the library, type and device of a reference."""
    if hasattr(values, "detach"):
        return values.to(reference)
    if hasattr(reference, "detach"):
        return reference.new_tensor(values)
    if isinstance(reference, int | float):
        return float(values)
    return np.asarray(values, reference.dtype)

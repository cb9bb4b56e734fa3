"""The noise schedule: one object for flow matching and v-prediction, for training and for sampling.

Arrays are NumPy or torch: a bundle samples without importing torch. Axes: B batch.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .errors import ConfigError, unknown

Array = Any  # numpy.ndarray or torch.Tensor; a time may also be a plain number

SPACINGS = ("trailing", "thousandths", "linear_quadratic")
# Of "linear_quadratic": how much of the noise the first half of the steps takes away.
LINEAR_SHARE = 0.025
COSINE_POWER = (*(math.cos(math.pi / 2 * i / 1000) ** 2 for i in range(1, 1000)), 0.0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a sample turns into noise: x_t = a(t) clean + b(t) noise, t in [0, 1], 1 is pure noise.

    kind: "flow" (a = 1 - t, b = t, the model predicts noise - clean) or
        "v" (a² + b² = 1, the model predicts a noise - b clean).
    spacing: how sampling times lie before they are shifted: "trailing" (even from 1 to 0),
        "thousandths" (even from 1 to 1/1000, then 0), or "linear_quadratic" (small steps first).
    shift: moves the sampling times of "flow" towards the noise; 1 leaves them even.
    growth: (slope, intercept) of the logarithm of the shift over the number of latent cells, for
        models that shift larger videos more; `at` settles it. Empty if the shift is the same.
    last: sampling times are stretched so that the last one before 0 is this; 0 leaves them.
    signal_power: a² at N even times from 1/N to 1, for "v" only; linear between them. Its last
        value must be 0 (zero terminal SNR). The default is a = cos(pi t / 2).

    Source: Lipman et al. 2023, eq. 20 (flow); Salimans & Ho 2022, sec. 2.4 (v); Esser et al. 2024,
    eq. 23 (shift); Lin et al. 2024 (zero terminal SNR, trailing times); Polyak et al. 2024 (linear
    and quadratic times); growth and last are as diffusers' flow-matching schedulers have them.
    """

    kind: str = "flow"
    spacing: str = "trailing"
    shift: float = 1.0
    growth: tuple[float, ...] = ()
    last: float = 0.0
    signal_power: tuple[float, ...] = COSINE_POWER

    def __post_init__(self) -> None:
        if self.kind not in ("flow", "v"):
            raise ConfigError(unknown("schedule", self.kind, ("flow", "v")))
        if self.spacing not in SPACINGS:
            raise ConfigError(unknown("spacing", self.spacing, SPACINGS))
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

    def towards(self, noisy: Array, clean: Array, time: Array, next_time: Array) -> Array:
        """Go from one time to the next as if the clean sample were this one.

        Shapes: noisy, clean, result [B, ...]; times [B] or numbers, the first above 0.
        Source: Lu et al. 2022 (DPM-Solver++), eq. 9 with a constant data prediction.
        """
        a, b = self._broadcast(time, noisy)
        return self.noise(clean, (noisy - a * clean) / b, next_time)

    def times(self, steps: int) -> tuple[float, ...]:
        """List the steps + 1 times of a sampler: first exactly 1, last exactly 0.

        Raises: ValueError if steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, not {steps}")
        times = [self._spaced(i, steps) for i in range(steps)]
        times = [self.shift * t / (self.shift * t + (1 - t)) for t in times]
        if self.last and steps > 1:
            stretch = (1 - self.last) / (1 - times[-1])
            times = [1 - (1 - t) * stretch for t in times]
        return (*times, 0.0)

    def at(self, cells: int) -> "Schedule":
        """Give the schedule for videos of so many latent cells, F x h x w."""
        if not self.growth:
            return self
        slope, intercept = self.growth
        return replace(self, shift=math.exp(slope * cells + intercept), growth=())

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values; what is as by default is left out, but kind and shift."""
        values = asdict(self)
        for name in ("spacing", "growth", "last"):
            if values[name] == getattr(type(self), name):
                del values[name]
        if self.kind == "flow" or self.signal_power == COSINE_POWER:
            del values["signal_power"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Schedule":
        """Make a schedule from what `to_dict` gave."""
        values = dict(values)
        for name in {"signal_power", "growth"} & set(values):
            values[name] = tuple(values[name])
        return cls(**values)

    def _spaced(self, index: int, steps: int) -> float:
        """Give the time before a step, not shifted."""
        if self.spacing == "trailing":
            return 1 - index / steps
        if self.spacing == "thousandths":
            return 1 - index / steps * (1 - 1 / 1000)
        if steps == 1:
            return 1.0
        linear = steps // 2
        quadratic = steps - linear
        curve = (1 - LINEAR_SHARE * steps / linear) / quadratic**2
        return 1 - LINEAR_SHARE * index / linear - curve * max(0, index - linear) ** 2

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

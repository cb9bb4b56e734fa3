"""A pair becomes a short video that starts at the input and ends at the target, and back.

Pure functions on arrays (NumPy or torch). Axes: C channels, T frames, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import ConfigError, unknown

Array = Any  # numpy.ndarray or torch.Tensor

# How far frame s in [0, 1] has gone from input (0) to target (1).
WEIGHTS: dict[str, Callable[[float], float]] = {
    "linear": lambda s: s,
    "quadratic": lambda s: s**2,
    "square_root": lambda s: s**0.5,
    "discrete": lambda s: float(s >= 0.5),
    "repeat_target": lambda s: float(s > 0),
}
KINDS = (*WEIGHTS, "tiles")
TILES = 4  # cells a side in "tiles"


@dataclass(frozen=True, kw_only=True)
class Transition:
    """How a pair becomes a video, and a video gives back its answer.

    kind: "linear", "quadratic", "square_root" blend; "discrete" shows the input for the first half
        (F // 2 frames) and the target after it; "repeat_target" is [x, y, y, ...]; "tiles" swaps
        the cells of a 4x4 grid one group after the other, in an order drawn from `seed`.
    frames: T, at least 2.
    span: the frames of a longer video that this one stands for: the answer's place in time is that
        of its last frame. None leaves every frame in its own place.

    Source: Acuaviva et al. 2025, sec. 3 (all but repeat_target); Wu et al. 2025, ChronoEdit
    (repeat_target; 5 frames that span 29).
    """

    kind: str = "repeat_target"
    frames: int = 5
    seed: int = 0
    span: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(unknown("transition", self.kind, KINDS))
        if self.frames < 2:
            raise ConfigError(f"a transition needs at least 2 frames, not {self.frames}")
        if self.span is not None and self.span < self.frames:
            raise ConfigError(
                f"{self.frames} frames cannot span {self.span}: give at least as many"
            )

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values; a span only if there is one."""
        return {k: v for k, v in vars(self).items() if k != "span" or v is not None}

    def weights(self) -> tuple[float, ...]:
        """Give, frame by frame, how much of the target is seen (the share of cells in "tiles")."""
        last = self.frames - 1
        if self.kind == "tiles":
            return tuple(round(f / last * TILES**2) / TILES**2 for f in range(self.frames))
        return tuple(WEIGHTS[self.kind](f / last) for f in range(self.frames))

    def video(self, source: Array, target: Array) -> Array:
        """Play the way from the input to the target.

        Shapes: source, target [..., C, H, W]; result [..., C, T, H, W].
        Raises: ValueError if the shapes differ.
        """
        if source.shape != target.shape:
            raise ValueError(
                f"input {tuple(source.shape)} and target {tuple(target.shape)} differ in shape"
            )
        if self.kind == "tiles":
            frames = [self._mosaic(source, target, weight) for weight in self.weights()]
        else:
            frames = [(1 - w) * source + w * target for w in self.weights()]
        return _stack_time(frames)

    def answer(self, video: Array) -> Array:
        """Give the answer of a video: its last frame.

        Shapes: video [..., C, T, H, W]; result [..., C, H, W].
        """
        return video[..., -1, :, :]

    def _mosaic(self, source: Array, target: Array, weight: float) -> Array:
        height, width = source.shape[-2:]
        order = np.random.default_rng(self.seed).permutation(TILES**2)
        swapped = order[: round(weight * TILES**2)]
        rows = np.arange(height) * TILES // height
        columns = np.arange(width) * TILES // width
        shown = np.isin(rows[:, None] * TILES + columns[None, :], swapped)
        is_numpy = isinstance(source, np.ndarray)
        mask = shown.astype(source.dtype) if is_numpy else source.new_tensor(shown)
        return source * (1 - mask) + target * mask


def _stack_time(frames: list[Array]) -> Array:
    """Put frames [..., C, H, W] side by side as [..., C, T, H, W]."""
    if isinstance(frames[0], np.ndarray):
        return np.stack(frames, axis=-3)
    import torch

    return torch.stack(frames, dim=-3)

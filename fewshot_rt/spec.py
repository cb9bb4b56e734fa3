"""What passes between roles: named tensors, their axes, and the shapes of videos and latents."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .errors import ModelError

Array = Any  # numpy.ndarray or torch.Tensor
ROLES = ("encoder", "denoiser", "decoder")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a base lays out pixels and latents.

    channels: C of the latents. time_factor, space_factor: pixels per latent; a video of 1 + k x
    time_factor frames has 1 + k latent frames. multiple: height and width must be multiples of it.
    native: (height, width) it was pretrained at. frames: the T it is made for, shortest first.
    known_frames: latent frames at the start that the condition already fixes; no loss there.
    merged_frames: latent frames that the denoiser merges into one; where their number is not a
        multiple of it, there are more in front, copies of the first.
    is_fixed: whether the native size is the only one.
    """

    channels: int
    time_factor: int
    space_factor: int
    multiple: int
    native: tuple[int, int]
    frames: tuple[int, ...]
    known_frames: int = 0
    merged_frames: int = 1
    is_fixed: bool = False

    def latent_shape(self, *, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Give (C, F, h, w) of a video.

        Raises: ModelError if the size or the number of frames does not fit this base.
        """
        if height % self.multiple or width % self.multiple:
            raise ModelError(
                f"{width}x{height} does not fit: both sides must be multiples of {self.multiple}"
            )
        if self.is_fixed and (height, width) != self.native:
            raise ModelError(
                f"{width}x{height} does not fit: this base learned places for "
                f"{self.native[1]}x{self.native[0]} alone. Leave out --size."
            )
        if (frames - 1) % self.time_factor:
            raise ModelError(
                f"{frames} frames do not fit: use 1 + a multiple of {self.time_factor}"
            )
        own = 1 + (frames - 1) // self.time_factor
        latent_frames = own + -own % self.merged_frames
        if latent_frames - self.extra_frames(latent_frames) != own:
            raise ModelError(
                f"{frames} frames do not fit: their {own} latent frames could not be told from "
                f"others after merging. Use one of {', '.join(map(str, self.frames))}."
            )
        return self.channels, latent_frames, height // self.space_factor, width // self.space_factor

    def extra_frames(self, latent_frames: int) -> int:
        """Say how many of so many latent frames are copies of the first, in front.

        Videos that fill one merged frame have none, all longer ones one.
        """
        return int(latent_frames > self.merged_frames > 1)


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor: its NumPy type name and its axes, each a number or a name if it varies."""

    name: str
    dtype: str
    axes: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The named tensors of one role, and the sizes (least, usual, most) of every axis that varies.

    It alone gives example inputs, dynamic shapes, axis names and run-time checks.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """Give the greatest size of any axis that varies; 1 if none does."""
        return max((most for _, _, most in self.sizes.values()), default=1)

    def shape(self, spec: TensorSpec, **sizes: int) -> tuple[int, ...]:
        """Give the shape of a tensor at the usual sizes, or at those given by axis name."""
        return tuple(
            axis if isinstance(axis, int) else sizes.get(axis, self.sizes[axis][1])
            for axis in spec.axes
        )

    def example(self, *, seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
        """Draw example inputs: standard normal; any bytes; a tensor named "time" in (0, 1)."""
        rng = np.random.default_rng(seed)
        return {spec.name: _draw(rng, spec, self.shape(spec, **sizes)) for spec in self.inputs}

    def varying(self, spec: TensorSpec) -> Iterator[tuple[int, str]]:
        """List (position, name) of the axes of a tensor that vary."""
        return ((i, axis) for i, axis in enumerate(spec.axes) if isinstance(axis, str))

    def check(self, tensors: Mapping[str, Array]) -> None:
        """Require that tensors fit: names, ranks, fixed axes, ranges, one size for one axis name.

        Raises: ModelError with the name of the tensor and what was expected.
        """
        expected = {spec.name for spec in self.inputs}
        if set(tensors) != expected:
            raise ModelError(f"expected tensors {sorted(expected)}, got {sorted(tensors)}")
        seen: dict[str, int] = {}
        for spec in self.inputs:
            shape = tuple(tensors[spec.name].shape)
            if len(shape) != len(spec.axes):
                raise ModelError(f"{spec.name}: expected axes {spec.axes}, got shape {shape}")
            for size, axis in zip(shape, spec.axes, strict=True):
                if not self._fits(size, axis, seen):
                    raise ModelError(f"{spec.name}: axes {spec.axes} do not admit {shape}")

    def _fits(self, size: int, axis: int | str, seen: dict[str, int]) -> bool:
        if isinstance(axis, int):
            return size == axis
        least, _, most = self.sizes[axis]
        return least <= size <= most and seen.setdefault(axis, size) == size

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Signature":
        """Make a signature from what `to_dict` gave, or from its JSON."""
        inputs, outputs = (
            tuple(TensorSpec(v["name"], v["dtype"], tuple(v["axes"])) for v in values[key])
            for key in ("inputs", "outputs")
        )
        sizes = {name: (v[0], v[1], v[2]) for name, v in values["sizes"].items()}
        return cls(inputs=inputs, outputs=outputs, sizes=sizes)


def _draw(rng: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    if spec.dtype == "uint8":
        return rng.integers(0, 256, shape, dtype=np.uint8)
    values = rng.uniform(0.05, 0.95, shape) if spec.name == "time" else rng.normal(size=shape)
    return values.astype(spec.dtype)

"""Scenes as numbers: what is in them, how the camera sees them, how they look. All on the device.

A scene is a dictionary of tensors, so that two scenes can be blended number by number; that is how
events move. Axes: B scenes, K layers of objects, H W pixels. Lengths are in half image heights,
angles in radians.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LAYERS = 8
FAMILIES = ("disc", "polygon", "star", "ring", "stroke", "curve", "glyph")
GROUNDS = ("texture", "tiling", "cells", "landscape", "road")
GROUND_SHARES = (0.5, 0.14, 0.08, 0.14, 0.14)
COLOURS = 6  # in the palette of a ground
GLYPH_STROKES = 3
CANVAS = 128  # pixels a side of a texture

Scene = dict[str, Tensor]


@dataclass(frozen=True)
class Dice:
    """Random draws of one batch: every call gives [B, *shape]."""

    batch: int
    generator: torch.Generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw evenly between two numbers."""
        values = torch.rand(
            self.batch, *shape, generator=self.generator, device=self.generator.device
        )
        return low + (high - low) * values

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Draw 1 with a probability, else 0."""
        return (self.uniform(0, 1, *shape) < probability).float()

    def integer(self, count: int, *shape: int) -> Tensor:
        """Draw a whole number below `count`."""
        return self.uniform(0, count, *shape).long().clamp(max=count - 1)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(
            self.batch, *shape, generator=self.generator, device=self.generator.device
        )


def draw_scene(dice: Dice) -> Scene:
    """Draw the numbers of a batch of scenes.

    Shapes: layers [B, K, ...], camera and look [B], textures [B, C, S, S].
    """
    return _draw_layers(dice) | _draw_camera(dice) | _draw_look(dice) | _draw_ground(dice)


def _draw_layers(dice: Dice) -> Scene:
    """Layers of one to three kinds a scene; a repeated layer is a field of many small objects."""
    kinds = 3
    kind = dice.integer(kinds, LAYERS)
    count = 1 + dice.uniform(0, 1) ** 1.5 * (LAYERS - 1)
    rank = torch.arange(LAYERS, device=kind.device)[None]
    repeated = dice.chance(0.35)[:, None] * (rank < 2)
    crowded = dice.chance(0.3)[:, None]
    of_kind = {
        "family": dice.integer(len(FAMILIES), kinds),
        "corners": 3 + dice.integer(5, kinds),
        "wave": dice.uniform(0.0, 0.25, kinds) * dice.chance(0.5, kinds),
        "bumps": dice.uniform(0.0, 0.1, kinds) * dice.chance(0.3, kinds),
        "red": dice.uniform(-1, 1, kinds),
        "green": dice.uniform(-1, 1, kinds),
        "blue": dice.uniform(-1, 1, kinds),
        "shine": dice.uniform(-0.1, 0.6, kinds),
        "grain": dice.uniform(0.0, 0.5, kinds) * dice.chance(0.7, kinds),
        "rim": dice.uniform(-0.6, 0.3, kinds) * dice.chance(0.5, kinds),
        "core": dice.uniform(-0.8, 0.8, kinds) * dice.chance(0.3, kinds),
    }
    layers = {name: values.gather(1, kind) for name, values in of_kind.items()}
    layers["strokes"] = _draw_strokes(dice, kinds)[
        torch.arange(dice.batch, device=kind.device)[:, None], kind
    ]
    jitter = 0.12 * dice.normal(3, LAYERS).unbind(1)[0]
    size = dice.uniform(0.12, 0.5, LAYERS).sort(dim=1).values
    size = size * (1 - repeated) + dice.uniform(0.05, 0.16, LAYERS) * repeated
    # The kind of a thing that is there, so that what happens to it is seen.
    one = (dice.uniform(0, 1) * count).long()
    layers |= {
        "chosen_kind": kind.gather(1, one[:, None])[:, 0].float(),
        "kind": kind.float(),
        "visible": ((rank < count[:, None]) * (1 - dice.chance(0.1, LAYERS))).float(),
        "x": dice.uniform(-1.0, 1.0, LAYERS),
        "y": dice.uniform(-1.0, 1.0, LAYERS),
        "size": size,
        "stretch": dice.uniform(0.75, 1.3, LAYERS),
        "angle": dice.uniform(-math.pi, math.pi, LAYERS),
        "phase": dice.uniform(0, 2 * math.pi, LAYERS),
        "soft": dice.uniform(0.5, 1.5, LAYERS) + 4 * dice.chance(0.15)[:, None],
        "opacity": 1 - dice.uniform(0, 0.4, LAYERS) * dice.chance(0.2)[:, None],
        "repeated": repeated,
        "period": size * (dice.uniform(2.6, 5.0, LAYERS) * (1 - crowded) + 2.1 * crowded),
        "gaps": dice.uniform(0.0, 0.5, LAYERS) * (1 - 0.7 * crowded),
        "light": torch.zeros_like(size),
        "red": layers["red"] + jitter,
        "green": layers["green"] + jitter,
        "blue": layers["blue"] + jitter,
    }
    return layers


def _draw_strokes(dice: Dice, kinds: int) -> Tensor:
    """Draw figures as strokes that go on from one another over a grid of 3x3 points.

    Shapes: result [B, kinds, strokes, 4]: from x, y to x, y.
    """
    points = (dice.integer(3, kinds, GLYPH_STROKES + 1, 2) - 1) * 0.75
    return torch.cat([points[:, :, :-1], points[:, :, 1:]], dim=-1)


def _draw_camera(dice: Dice) -> Scene:
    zero = dice.uniform(0, 0)
    return {"pan_x": zero, "pan_y": zero, "zoom": zero, "roll": zero, "mirror": zero + 1}


def _draw_look(dice: Dice) -> Scene:
    """Every look has some chance at the start, so that the first frame does not tell the event."""
    zero = dice.uniform(0, 0)
    return {
        "colour": 1 - dice.chance(0.25) * dice.uniform(0.5, 1.0).round(),
        "brightness": dice.uniform(-0.25, 0.25),
        "contrast": 1 - dice.chance(0.4) * dice.uniform(-0.15, 0.7),
        "noise": dice.chance(0.3) * dice.uniform(0.05, 0.4),
        "fog": dice.chance(0.1) * dice.uniform(0.2, 0.7),
        "blur": dice.chance(0.2) * dice.uniform(0.3, 1.0),
        "pixels": dice.chance(0.05),
        "patch": dice.chance(0.1),
        "patch_x": dice.uniform(-0.7, 0.7),
        "patch_y": dice.uniform(-0.7, 0.7),
        "patch_size": dice.uniform(0.15, 0.45),
        "patch_tone": dice.uniform(-1, 1),
        "hue": zero,
        "negative": zero,
        "sketch": zero,
        "two_tone": zero,
        "silhouette": zero,
        "silhouette_kind": zero,
        "outline": zero,
        "depth": zero,
        "labels": zero,
        "ground_black": zero,
        "ground_white": zero,
    }


def _draw_ground(dice: Dice) -> Scene:
    """What is behind the objects, a light gradient, and 1/f textures on both."""
    even = dice.chance(0.3)
    shares = torch.tensor(GROUND_SHARES, device=even.device)
    kind = torch.multinomial(shares, dice.batch, replacement=True, generator=dice.generator)
    return {
        "ground_kind": kind,
        "palette": 0.8 * dice.uniform(-1, 1, COLOURS, 1) + 0.5 * dice.normal(COLOURS, 3),
        "horizon": dice.uniform(-0.5, 0.3),
        "ground_angle": dice.uniform(-math.pi, math.pi),
        "ground_scale": dice.uniform(0.08, 0.3),
        "ground_style": dice.integer(3).float(),
        "ground_phase": dice.uniform(0, 9),
        "ground": dice.uniform(-0.9, 0.9, 1) + 0.25 * dice.normal(3),
        "ground_contrast": dice.uniform(0.02, 0.5) * (1 - even) + 0.02 * even,
        "ground_texture": coloured_noise(dice, channels=3),
        "texture": coloured_noise(dice, channels=1),
        "light_x": 0.3 * dice.normal(),
        "light_y": 0.3 * dice.normal(),
        "grain_field": dice.normal(3, CANVAS, CANVAS),
    }


def coloured_noise(dice: Dice, *, channels: int) -> Tensor:
    """Draw periodic noise with amplitude 1 / f^p, p from 0.7 to 2.2, zero mean, unit variance.

    Shapes: [B, channels, S, S].
    Source: natural images have p near 1; Field 1987.
    """
    white = torch.fft.rfft2(dice.normal(channels, CANVAS, CANVAS))
    fy = torch.fft.fftfreq(CANVAS, device=white.device)[:, None]
    fx = torch.fft.rfftfreq(CANVAS, device=white.device)[None]
    frequency = (fy**2 + fx**2).sqrt().clamp(min=1 / CANVAS)
    power = dice.uniform(0.7, 2.2, 1, 1, 1)
    shared = white[:, :1]
    mixed = 0.8 * shared + 0.6 * white if channels > 1 else white
    noise: Tensor = torch.fft.irfft2(mixed * frequency ** (-power), s=(CANVAS, CANVAS))
    noise = noise - noise.mean(dim=(2, 3), keepdim=True)
    return noise / noise.std(dim=(2, 3), keepdim=True)


def blend(before: Scene, after: Scene, weight: Tensor) -> Scene:
    """Go from one scene to another, number by number. Shapes: weight [B], 0 is before."""
    result = {}
    for name, start in before.items():
        end = after[name]
        if end is start:
            result[name] = start
        else:
            w = weight.reshape((-1,) + (1,) * (start.ndim - 1))
            result[name] = (1 - w) * start + w * end
    return result


def column(values: Tensor, dims: int = 2) -> Tensor:
    """Give numbers of scenes axes of length 1, so that they meet pixels. Shapes: [B, 1, ...]."""
    return values.reshape((-1,) + (1,) * dims)


def hashed(a: Tensor, b: Tensor, seed: Tensor) -> Tensor:
    """Give a number in [0, 1) that looks random for every pair of whole numbers."""
    return ((a * 12.9898 + b * 78.233 + seed * 37.719).sin() * 43758.5453) % 1

"""What is behind the objects: textures, tilings, grids of cells, landscapes and roads.

Each kind gives colours and nearness for its own scenes. Axes: B scenes, H W pixels; x, y [B, H, W].
"""

import torch
from torch import Tensor
from torch.nn import functional

from .scene import GROUNDS, Scene, column, hashed

BANDS = 4  # hills of a landscape, one behind another


def lay_ground(scene: Scene, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Give the ground's colours and its nearness in [0, 1]. Shapes: [B, 3, H, W], [B, H, W]."""
    colours = scene["ground"][..., None, None].expand(-1, 3, *x.shape[1:])
    nearness = torch.zeros_like(x)
    for kind, make in KINDS.items():
        rows = (scene["ground_kind"] == GROUNDS.index(kind)).nonzero()[:, 0]
        if len(rows):
            chosen = {name: scene[name][rows] for name in NEEDED}
            made, near = make(chosen, x[rows], y[rows])
            colours = colours.index_copy(0, rows, made)
            nearness = nearness.index_copy(0, rows, near)
    grain = lookup(scene["ground_texture"], x / 2, y / 2)
    return colours + grain * column(scene["ground_contrast"], 3), nearness


def lookup(texture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Read a texture at coordinates that may leave [-1, 1]. Shapes: result [B, C, H, W]."""
    # A mirrored repeat has no seam at the border.
    grid = torch.stack([x, y], dim=-1)
    return functional.grid_sample(
        texture, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def _tiling(s: Scene, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Stripes, checks and bricks, in two colours with some play in each tile."""
    cos, sin = column(s["ground_angle"].cos()), column(s["ground_angle"].sin())
    scale, style = column(s["ground_scale"]), column(s["ground_style"])
    across, down = (cos * x + sin * y) / scale, (cos * y - sin * x) / scale
    is_brick = (style == 2).float()
    row = down.floor()
    across = across / (1 + is_brick) + 0.5 * is_brick * (row % 2)
    tile = across.floor()
    parity = (tile + row * (style > 0)) % 2
    colours = _mixed(s, 0, 1, parity)
    play = 0.4 * (hashed(tile, row * (style > 0), column(s["ground_phase"])) - 0.5)
    joint = torch.minimum(across % 1 * (1 + is_brick), down % 1) < 0.08
    colours = torch.lerp(colours, _colour(s, 2), (is_brick * joint)[:, None])
    return colours + play[:, None], torch.zeros_like(x)


def _cells(s: Scene, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Grids of coloured cells, about half of them in the first colour."""
    scale = column(s["ground_scale"]) * 1.3
    across, down = x / scale, y / scale
    chance = hashed(across.floor(), down.floor(), column(s["ground_phase"]))
    index = ((chance * 2 - 1).clamp(min=0) * s["palette"].shape[1]).long()
    flat = index.flatten(1)[..., None].expand(-1, -1, 3)
    colours = s["palette"].gather(1, flat).transpose(1, 2).reshape(-1, 3, *x.shape[1:])
    line = torch.minimum(across % 1, down % 1) < 0.1
    return colours * (1 - 0.8 * line[:, None].float()), torch.zeros_like(x)


def _landscape(s: Scene, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A sky and hills, each nearer than the one before, the far ones paler."""
    sky = _colour(s, 0) + 0.5 * (y - column(s["horizon"]))[:, None]
    colours, nearness = sky, torch.zeros_like(x)
    rough = column(s["ground_scale"])
    for band in range(BANDS):
        phase = column(s["ground_phase"]) * (band + 1)
        ridge = (3 * x + phase).sin() + 0.5 * (7 * x - 2 * phase).sin() + 0.2 * (19 * x).sin()
        height = column(s["horizon"]) + 0.28 * band - rough * ridge
        is_hill = ((y - height) * 40).clamp(0, 1)
        pale = torch.lerp(_colour(s, 0), _colour(s, 1 + band), (band + 1) / BANDS)
        colours = torch.lerp(colours, pale.expand_as(colours), is_hill[:, None])
        nearness = torch.lerp(nearness, torch.full_like(nearness, (band + 1) / 5), is_hill)
    return colours, nearness


def _road(s: Scene, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A plain in perspective under a sky, with a road that bends away and its markings."""
    below = y - column(s["horizon"])
    far = 1 / below.clamp(min=0.02)
    lateral = (x - 0.5 * column(s["ground_angle"].sin()) * (1 + 0.2 * far)) * far
    width = 0.35 + 2 * column(s["ground_scale"])
    along = far * 3 + column(s["ground_phase"])
    is_plain = (below * 40).clamp(0, 1)
    plain = _mixed(s, 1, 2, (along % 1 > 0.5).float() * 0.2)
    is_road = ((width - lateral.abs()) / far * 60).clamp(0, 1)
    colours = torch.lerp(plain, _colour(s, 3), is_road[:, None])
    middle = (lateral.abs() < 0.06 * width) & (along % 1 < 0.5)
    side = (lateral.abs() - 0.85 * width).abs() < 0.05 * width
    colours = torch.lerp(colours, _colour(s, 4), (middle | side)[:, None].float() * 0.9)
    sky = _colour(s, 0) + 0.5 * below[:, None]
    colours = torch.lerp(sky, colours, is_plain[:, None])
    return colours, below.clamp(0, 1) * is_plain


KINDS = {"tiling": _tiling, "cells": _cells, "landscape": _landscape, "road": _road}
NEEDED = (
    "palette",
    "horizon",
    "ground_angle",
    "ground_scale",
    "ground_style",
    "ground_phase",
)


def _colour(s: Scene, index: int) -> Tensor:
    """Give a colour of the palette. Shapes: [B, 3, 1, 1]."""
    return s["palette"][:, index][..., None, None]


def _mixed(s: Scene, first: int, second: int, share: Tensor) -> Tensor:
    return torch.lerp(_colour(s, first), _colour(s, second), share[:, None])

"""Outlines of objects: how far inside of its shape each pixel of a layer is.

Axes: B objects, H W pixels; u, v are the object's own coordinates, its radius about 1.
"""

import math

import torch
from torch import Tensor

from .scene import FAMILIES, Scene, column, hashed

STROKE_WIDTH = 0.12  # a stroke's height over its length
CURVE_LENGTH, CURVE_WIDTH = 2.5, 0.07
GLYPH_WIDTH = 0.17


def locate(s: Scene, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give u, v, the object's size factor, and where it is shown at all.

    A repeated layer folds the plane into cells; a hash of the cell moves, sizes and omits it.
    """
    dx, dy = x - column(s["x"]), y - column(s["y"])
    repeated, period = column(s["repeated"]), column(s["period"])
    across, down = (dx / period).round() * repeated, (dy / period).round() * repeated
    first = hashed(across, down, column(s["phase"]))
    second = hashed(down, across, column(s["phase"]) + 1)
    dx = dx - across * period - repeated * period * 0.3 * (first - 0.5)
    dy = dy - down * period - repeated * period * 0.3 * (second - 0.5)
    growth = 1 + repeated * 0.5 * (hashed(across, down, second) - 0.5)
    shown = 1 - repeated * (first * 7 % 1 < column(s["gaps"])).float()
    angle = column(s["angle"]) + repeated * second * 6
    cos, sin = angle.cos(), angle.sin()
    length, stretch = column(s["size"]) * growth, column(s["stretch"])
    family = column(s["family"])
    thin = torch.where(family == FAMILIES.index("stroke"), STROKE_WIDTH, 1.0)
    long = torch.where(family == FAMILIES.index("curve"), CURVE_LENGTH, 1.0)
    u = (cos * dx + sin * dy) / (length * stretch * long)
    v = (cos * dy - sin * dx) / (length / stretch * thin)
    return u, v, growth * thin, shown


def outline(s: Scene, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give how far inside its outline a point is (in radii), and its share of the radius."""
    inside, share = _round(s, u, v)
    for name, make in (("curve", _curve), ("glyph", _glyph)):
        rows = (s["family"] == FAMILIES.index(name)).nonzero()[:, 0]
        if len(rows):
            chosen = {key: value[rows] for key, value in s.items()}
            inside = inside.index_copy(0, rows, make(chosen, u[rows], v[rows]))
    return inside, share


def _round(s: Scene, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes with one radius for each direction: discs, polygons, stars, rings, strokes."""
    radius = (u**2 + v**2).sqrt()
    theta = torch.atan2(v, u)
    family, corners, phase = (column(s[name]) for name in ("family", "corners", "phase"))
    turn = 2 * math.pi / corners
    polygon = (turn / 2).cos() / ((theta % turn) - turn / 2).cos()
    star = 1 - 0.39 * (1 + (corners * theta).cos()) / 2
    limit = torch.where(family == FAMILIES.index("polygon"), polygon, 1.0)
    limit = torch.where(family == FAMILIES.index("star"), star, limit)
    lobes = column(s["wave"]) * (2 * theta + phase).cos()
    limit = limit * (1 + lobes + column(s["bumps"]) * (5 * theta + 2 * phase).cos())
    inside = limit - radius
    ring = torch.minimum(inside, radius - 0.55 * limit)
    inside = torch.where(family == FAMILIES.index("ring"), ring, inside)
    return inside, radius / limit.clamp(min=0.1)


def _curve(s: Scene, u: Tensor, v: Tensor) -> Tensor:
    """Thin winding lines: fibres, vessels, cracks."""
    rate, phase = column(2 + s["corners"].float()), column(s["phase"])
    bend = 0.1 + column(s["wave"])
    middle = bend * ((rate * u + phase).sin() + 0.5 * (2.3 * rate * u - phase).sin())
    slope = bend * rate / CURVE_LENGTH * (rate * u + phase).cos()
    across = (v - middle).abs() / (1 + slope**2).sqrt()
    return torch.minimum(CURVE_WIDTH - across, 1 - u.abs())


def _glyph(s: Scene, u: Tensor, v: Tensor) -> Tensor:
    """Figures like letters: a few straight strokes between the points of a grid."""
    nearest = torch.full_like(u, 9.0)
    for ends in s["strokes"].unbind(1):
        ax, ay, bx, by = (column(value) for value in ends.unbind(1))
        dx, dy = bx - ax, by - ay
        along = ((u - ax) * dx + (v - ay) * dy) / (dx**2 + dy**2).clamp(min=1e-3)
        along = along.clamp(0, 1)
        apart = (u - ax - along * dx) ** 2 + (v - ay - along * dy) ** 2
        nearest = torch.minimum(nearest, apart)
    return GLYPH_WIDTH - nearest.sqrt()

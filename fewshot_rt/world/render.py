"""Scenes as pictures. Axes: B scenes, H W pixels; lengths in half image heights."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from .scene import FAMILIES, LAYERS, Scene

LABEL_COLOURS = (
    (1.0, -0.6, -0.6),
    (-0.6, 1.0, -0.6),
    (-0.6, -0.4, 1.0),
    (1.0, 0.9, -0.7),
    (0.9, -0.6, 0.9),
)


def render(scene: Scene, *, size: int) -> Tensor:
    """Paint a batch of scenes. Shapes: result [B, 3, H, W] in [-1, 1], H = W = size."""
    x, y = _camera(scene, size)
    maps = _Maps(scene, x, y)
    for layer in range(LAYERS):
        maps.add(layer, size)
    return _look(scene, maps)


def _camera(scene: Scene, size: int) -> tuple[Tensor, Tensor]:
    """Give the world coordinates that each pixel sees. Shapes: x, y [B, H, W]."""
    device = scene["zoom"].device
    line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    py, px = line[None, :, None], line[None, None, :]
    cos, sin = _column(scene["roll"].cos()), _column(scene["roll"].sin())
    scale = _column((-scene["zoom"]).exp())
    px = px * _column(scene["mirror"])
    x = (cos * px - sin * py) * scale + _column(scene["pan_x"])
    y = (sin * px + cos * py) * scale + _column(scene["pan_y"])
    return x, y


class _Maps:
    """The pictures that build up layer by layer: colours, coverage, labels, depth."""

    def __init__(self, scene: Scene, x: Tensor, y: Tensor) -> None:
        self.scene, self.x, self.y = scene, x, y
        light = 1 + _column(scene["light_x"]) * x + _column(scene["light_y"]) * y
        ground = _lookup(scene["ground_texture"], x / 2, y / 2)
        ground = scene["ground"][..., None, None] + ground * _column(scene["ground_contrast"], 3)
        self.light = light[:, None]
        self.ground = ground * (1 + 0.5 * (self.light - 1))
        self.colours = self.ground
        self.covered = torch.zeros_like(x)
        self.chosen = torch.zeros_like(x)
        self.depth = torch.zeros_like(x)
        self.labels = torch.full_like(self.ground, -1.0)
        self.edge = torch.zeros_like(x)
        self.palette = torch.tensor(LABEL_COLOURS, device=x.device)

    def add(self, layer: int, size: int) -> None:
        """Put one layer over what is there."""
        s = {name: value[:, layer] for name, value in self.scene.items() if _is_layer(value)}
        u, v, growth, shown = _local(s, self.x, self.y)
        inside, radius = _inside(s, u, v)
        length = _column(s["size"]) * growth
        softness = _column(s["soft"]) * 2 / size
        cover = (inside * length / softness + 0.5).clamp(0, 1) * shown * _column(s["visible"])
        alpha = cover * _column(s["opacity"])
        paint = self._paint(s, u, v, radius)
        self.colours = torch.lerp(self.colours, paint, alpha[:, None])
        self.covered = torch.maximum(self.covered * (1 - cover), cover)
        is_chosen = _column((s["kind"] == self.scene["chosen_kind"]).float())
        self.chosen = torch.lerp(self.chosen, is_chosen.expand_as(cover), cover)
        self.depth = torch.lerp(self.depth, _column(0.25 + 1.5 * s["size"]).expand_as(cover), cover)
        label = self.palette[s["family"].long()][..., None, None]
        self.labels = torch.lerp(self.labels, label.expand_as(self.labels), cover[:, None])
        rim = 1 - ((inside * length).abs() * size / 2 / 1.5).clamp(0, 1)
        rim = rim * shown * _column(s["visible"])
        self.edge = torch.maximum(self.edge * (1 - cover), rim)

    def _paint(self, s: Scene, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
        base = torch.stack([s["red"], s["green"], s["blue"]], dim=1)[..., None, None]
        shine = _column(s["shine"]) * (0.5 - u * 0.6 - v * 0.6)
        grain = _column(s["grain"]) * _lookup(self.scene["texture"], u / 4, v / 4)[:, 0]
        rim = _column(s["rim"]) * (radius**4).clamp(max=1)
        shade = (shine + grain * 0.5 + rim)[:, None] + 0.3 * (self.light - 1)
        return base + shade + 1.2 * _column(s["light"], 3)


def _is_layer(value: Tensor) -> bool:
    return value.ndim == 2 and value.shape[1] == LAYERS


def _local(s: Scene, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give coordinates within the object, its size factor, and where it is shown at all.

    A repeated layer folds the plane into cells; a hash of the cell moves, sizes and omits it.
    """
    dx, dy = x - _column(s["x"]), y - _column(s["y"])
    repeated, period = _column(s["repeated"]), _column(s["period"])
    column, row = (dx / period).round() * repeated, (dy / period).round() * repeated
    first = _hash(column, row, _column(s["phase"]))
    second = _hash(row, column, _column(s["phase"]) + 1)
    dx = dx - column * period - repeated * period * 0.3 * (first - 0.5)
    dy = dy - row * period - repeated * period * 0.3 * (second - 0.5)
    growth = 1 + repeated * 0.5 * (_hash(column, row, second) - 0.5)
    shown = 1 - repeated * (first * 7 % 1 < 0.3).float()
    angle = _column(s["angle"]) + repeated * second * 6
    cos, sin = angle.cos(), angle.sin()
    length, stretch = _column(s["size"]) * growth, _column(s["stretch"])
    thin = torch.where(_column(s["family"]) == FAMILIES.index("stroke"), 0.12, 1.0)
    u = (cos * dx + sin * dy) / (length * stretch)
    v = (cos * dy - sin * dx) / (length / stretch * thin)
    return u, v, growth * thin, shown


def _inside(s: Scene, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give how far inside its outline a point is (in radii), and its share of the radius."""
    radius = (u**2 + v**2).sqrt()
    theta = torch.atan2(v, u)
    family = _column(s["family"])
    corners = _column(s["corners"].float())
    turn = 2 * math.pi / corners
    polygon = (turn / 2).cos() / ((theta % turn) - turn / 2).cos()
    star = 1 - 0.3 * (1 + (corners * theta).cos()) / 2 * 1.3
    limit = torch.where(family == FAMILIES.index("polygon"), polygon, torch.ones_like(theta))
    limit = torch.where(family == FAMILIES.index("star"), star, limit)
    limit = limit * (1 + _column(s["wave"]) * (2 * theta + _column(s["phase"])).cos())
    inside = limit - radius
    ring = torch.minimum(inside, radius - 0.55 * limit)
    inside = torch.where(family == FAMILIES.index("ring"), ring, inside)
    return inside, radius / limit.clamp(min=0.1)


def _look(scene: Scene, maps: _Maps) -> Tensor:
    """Turn the maps into the picture that is seen."""
    ground_share = (1 - maps.covered)[:, None]
    picture = maps.colours
    picture = torch.lerp(picture, picture * 0 - 1, ground_share * _column(scene["ground_black"], 3))
    picture = torch.lerp(picture, picture * 0 + 1, ground_share * _column(scene["ground_white"], 3))
    picture = picture + _column(scene["brightness"], 3)
    gray = picture.mean(dim=1, keepdim=True)
    picture = torch.lerp(gray.expand_as(picture), picture, _column(scene["colour"], 3))
    picture = torch.lerp(picture, _blurred(picture), _column(scene["blur"], 3))
    fog = scene["fog"][:, None, None, None] * (0.7 + 0.3 * maps.y[:, None])
    picture = picture + fog * (0.8 - picture)
    grain = functional.interpolate(scene["grain_field"], size=picture.shape[-2:], mode="nearest")
    picture = (picture + grain * _column(scene["noise"], 3)).clamp(-1, 1)
    picture = torch.lerp(picture, -picture, _column(scene["negative"], 3))
    for name, values in (
        ("silhouette", maps.covered * 2 - 1),
        ("silhouette_kind", maps.chosen * 2 - 1),
        ("outline", maps.edge * 2 - 1),
        ("depth", maps.depth * 2 - 1),
    ):
        picture = torch.lerp(picture, values[:, None].expand_as(picture), _column(scene[name], 3))
    picture = torch.lerp(picture, maps.labels, _column(scene["labels"], 3))
    return picture.clamp(-1, 1)


def _blurred(picture: Tensor) -> Tensor:
    size = picture.shape[-1]
    small = functional.interpolate(picture, size=size // 4, mode="area")
    return functional.interpolate(small, size=size, mode="bicubic", align_corners=False)


def _column(values: Tensor, dims: int = 2) -> Tensor:
    return values.reshape((-1,) + (1,) * dims)


def _hash(a: Tensor, b: Tensor, seed: Tensor) -> Tensor:
    """Give a number in [0, 1) that looks random for every cell."""
    return ((a * 12.9898 + b * 78.233 + seed * 37.719).sin() * 43758.5453) % 1


def _lookup(texture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Read a periodic texture at [0, 1] coordinates that may leave it. Shapes: [B, C, H, W]."""
    # A mirrored repeat has no seam at the border.
    grid = torch.stack([x, y], dim=-1)
    return functional.grid_sample(
        texture, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )

"""Scenes as pictures. Axes: B scenes, H W pixels; lengths in half image heights."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .ground import lay_ground, lookup
from .scene import LAYERS, Scene, column
from .shapes import locate, outline

LABEL_COLOURS = (
    (1.0, -0.6, -0.6),
    (-0.6, 1.0, -0.6),
    (-0.6, -0.4, 1.0),
    (1.0, 0.9, -0.7),
    (0.9, -0.6, 0.9),
    (-0.7, 0.9, 0.9),
    (1.0, 0.2, -0.8),
)
RIM_PIXELS = 1.5  # half the width of an outline
CORE = 0.45  # a core's share of its object's radius


def render(scene: Scene, *, size: int) -> Tensor:
    """Paint a batch of scenes. Shapes: result [B, 3, H, W] in [-1, 1], H = W = size."""
    x, y = _camera(scene, size)
    maps = _Maps(scene, x, y)
    for layer in range(LAYERS):
        rows = scene["visible"][:, layer].nonzero()[:, 0]
        if len(rows):
            maps.add(layer, rows, size)
    return _look(scene, maps)


def _camera(scene: Scene, size: int) -> tuple[Tensor, Tensor]:
    """Give the world coordinates that each pixel sees. Shapes: x, y [B, H, W]."""
    device = scene["zoom"].device
    line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    py, px = line[None, :, None], line[None, None, :]
    cos, sin = column(scene["roll"].cos()), column(scene["roll"].sin())
    scale = column((-scene["zoom"]).exp())
    px = px * column(scene["mirror"])
    x = (cos * px - sin * py) * scale + column(scene["pan_x"])
    y = (sin * px + cos * py) * scale + column(scene["pan_y"])
    return x, y


class _Maps:
    """The pictures that build up layer by layer: colours, coverage, labels, depth."""

    def __init__(self, scene: Scene, x: Tensor, y: Tensor) -> None:
        self.scene, self.x, self.y = scene, x, y
        light = 1 + column(scene["light_x"]) * x + column(scene["light_y"]) * y
        self.light = light[:, None]
        ground, self.depth = lay_ground(scene, x, y)
        self.colours = ground * (1 + 0.5 * (self.light - 1))
        self.covered = torch.zeros_like(x)
        self.chosen = torch.zeros_like(x)
        self.labels = torch.full_like(self.colours, -1.0)
        self.edge = torch.zeros_like(x)
        self.palette = torch.tensor(LABEL_COLOURS, device=x.device)

    def add(self, layer: int, rows: Tensor, size: int) -> None:
        """Put one layer over what is there, in the scenes that show it."""
        s = {n: value[rows, layer] for n, value in self.scene.items() if _is_layer(value)}
        u, v, growth, shown = locate(s, self.x[rows], self.y[rows])
        inside, share = outline(s, u, v)
        shown = shown * column(s["visible"])
        pixels = inside * column(s["size"]) * growth * size / 2
        cover = (pixels / column(s["soft"]) + 0.5).clamp(0, 1) * shown
        self._over("colours", rows, self._paint(s, rows, u, v, share), cover * column(s["opacity"]))
        self._over("covered", rows, torch.ones_like(cover), cover)
        is_chosen = column((s["kind"] == self.scene["chosen_kind"][rows]).float())
        self._over("chosen", rows, is_chosen, cover)
        self._over("depth", rows, column(0.25 + 1.5 * s["size"]), cover)
        self._over("labels", rows, self.palette[s["family"].long()][..., None, None], cover)
        rim = (1 - (pixels.abs() / RIM_PIXELS)).clamp(0, 1) * shown
        self.edge[rows] = torch.maximum(self.edge[rows] * (1 - cover), rim)

    def _over(self, name: str, rows: Tensor, values: Tensor, cover: Tensor) -> None:
        below = getattr(self, name)
        cover = cover if below.ndim == 3 else cover[:, None]
        chosen = below[rows]
        below[rows] = torch.lerp(chosen, values.expand_as(chosen), cover)

    def _paint(self, s: Scene, rows: Tensor, u: Tensor, v: Tensor, share: Tensor) -> Tensor:
        base = torch.stack([s["red"], s["green"], s["blue"]], dim=1)[..., None, None]
        shine = column(s["shine"]) * (0.5 - u * 0.6 - v * 0.6)
        grain = column(s["grain"]) * lookup(self.scene["texture"][rows], u / 4, v / 4)[:, 0]
        rim = column(s["rim"]) * (share**4).clamp(max=1)
        core = column(s["core"]) * ((CORE - share) * 12).clamp(0, 1)
        shade = (shine + grain * 0.5 + rim + core)[:, None] + 0.3 * (self.light[rows] - 1)
        return base + shade + 1.2 * column(s["light"], 3)


def _is_layer(value: Tensor) -> bool:
    return value.ndim > 1 and value.shape[1] == LAYERS


def _look(scene: Scene, maps: _Maps) -> Tensor:
    """Turn the maps into the picture that is seen."""
    ground_share = (1 - maps.covered)[:, None]
    picture = maps.colours
    picture = torch.lerp(picture, picture * 0 - 1, ground_share * column(scene["ground_black"], 3))
    picture = torch.lerp(picture, picture * 0 + 1, ground_share * column(scene["ground_white"], 3))
    middle = picture.mean(dim=(1, 2, 3), keepdim=True)
    picture = middle + (picture - middle) * column(scene["contrast"], 3)
    picture = picture + column(scene["brightness"], 3)
    gray = picture.mean(dim=1, keepdim=True)
    picture = torch.lerp(gray.expand_as(picture), picture, column(scene["colour"], 3))
    picture = _where(picture, scene["hue"], lambda _, seen: seen.roll(1, dims=1))
    picture = _where(picture, scene["blur"], lambda _, seen: _blurred(seen))
    picture = _where(picture, scene["pixels"], lambda _, seen: _pixelated(seen))
    fog = scene["fog"][:, None, None, None] * (0.7 + 0.3 * maps.y[:, None])
    picture = picture + fog * (0.8 - picture)
    grain = functional.interpolate(scene["grain_field"], size=picture.shape[-2:], mode="nearest")
    picture = (picture + grain * column(scene["noise"], 3)).clamp(-1, 1)
    picture = _where(picture, scene["patch"], lambda rows, seen: _patched(scene, rows, seen))
    picture = torch.lerp(picture, -picture, column(scene["negative"], 3))
    picture = _where(picture, scene["sketch"], lambda _, seen: _sketched(seen))
    picture = _where(picture, scene["two_tone"], lambda _, seen: _two_toned(seen))
    for name, values in (
        ("silhouette", maps.covered * 2 - 1),
        ("silhouette_kind", maps.chosen * 2 - 1),
        ("outline", maps.edge * 2 - 1),
        ("depth", maps.depth * 2 - 1),
    ):
        picture = torch.lerp(picture, values[:, None].expand_as(picture), column(scene[name], 3))
    picture = torch.lerp(picture, maps.labels, column(scene["labels"], 3))
    return picture.clamp(-1, 1)


def _where(picture: Tensor, weight: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Change the pictures whose weight is not zero, and only compute these."""
    rows = weight.nonzero()[:, 0]
    if not len(rows):
        return picture
    seen = picture[rows]
    changed = torch.lerp(seen, change(rows, seen), column(weight[rows], 3))
    return picture.index_copy(0, rows, changed)


def _blurred(picture: Tensor) -> Tensor:
    size = picture.shape[-1]
    small = functional.interpolate(picture, size=size // 4, mode="area")
    return functional.interpolate(small, size=size, mode="bicubic", align_corners=False)


def _pixelated(picture: Tensor) -> Tensor:
    size = picture.shape[-1]
    small = functional.interpolate(picture, size=size // 4, mode="area")
    return functional.interpolate(small, size=size, mode="nearest")


def _patched(scene: Scene, rows: Tensor, picture: Tensor) -> Tensor:
    """Put a flat square over the picture, fixed to the screen."""
    size = picture.shape[-1]
    line = (torch.arange(size, device=picture.device) + 0.5) / size * 2 - 1
    half = column(scene["patch_size"][rows])
    beside = (line[None, None, :] - column(scene["patch_x"][rows])).abs() < half
    above = (line[None, :, None] - column(scene["patch_y"][rows])).abs() < half
    value = column(scene["patch_tone"][rows], 3)
    return torch.where((beside & above)[:, None], value, picture)


def _sketched(picture: Tensor) -> Tensor:
    """Bright lines where brightness changes, on black; a unit of slope is a step of 1/4."""
    gray = functional.pad(picture.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]
    down = gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]
    slope = (across**2 + down**2).sqrt()
    return ((2 * slope).clamp(max=1) * 2 - 1).expand_as(picture)


def _two_toned(picture: Tensor) -> Tensor:
    """Black and white, by whether a pixel is brighter than the mean of its surroundings."""
    gray = picture.mean(dim=1, keepdim=True)
    size = picture.shape[-1]
    small = functional.interpolate(gray, size=8, mode="area")
    around = functional.interpolate(small, size=size, mode="bilinear", align_corners=False)
    return ((gray - around) * 8).clamp(-1, 1).expand_as(picture)

"""What pretraining shows: samples of the base as it is, and the curve of its losses."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .bases import open_base
from .files import reported
from .images import montage, to_uint8, write_image
from .sample import sample
from .world import make_clips

EVENTS = ("silhouette", "outline", "depth", "labels", "mirror", "vanish", "drain", "focus")
LOSSES_FILE = "metrics.jsonl"
CURVE_SIZE = (640, 320)
MARGIN = 40
SMOOTHING = 10  # kept steps that are averaged to a point


@torch.no_grad()
def write_samples(folder: Path, path: Path) -> None:
    """Show what a base makes of a few events.

    Columns: first frame | after one step, after four | the autoencoder's last frame | last frame.
    Raises: ModelError if the folder is no base; DataError if the picture cannot be written.
    """
    base = open_base(str(folder))
    generator = torch.Generator().manual_seed(7)
    rows = []
    for event in EVENTS:
        size = base.geometry.native[0]
        video = make_clips(
            1, size=size, generator=generator, events=(event,), pace="repeat_target"
        ).video
        latents = base.encode(video)
        first = base.condition(video[:, :, 0], frames=latents.shape[2])
        conditions = first | base.embed(event)
        answers = [
            _answer(base, torch.zeros_like(latents), conditions, steps=1),
            _answer(base, torch.randn(latents.shape, generator=generator), conditions, steps=4),
            base.decode_last(latents),
        ]
        pictures = [video[:, :, 0], *answers, video[:, :, -1]]
        rows.append([to_uint8(p[0].numpy().transpose(1, 2, 0)) for p in pictures])
    headings = ["first", "1 step", "4 steps", "autoencoder", "last"]
    write_image(path, montage(rows, headings=headings))


def _answer(base: Any, noise: Tensor, conditions: dict[str, Tensor], *, steps: int) -> Tensor:
    denoiser = base.denoiser()
    *_, last = sample(
        lambda x, t: denoiser(x, t, **conditions), noise, schedule=base.schedule, steps=steps
    )
    answer: Tensor = base.decode_last(last.latents)
    return answer


def append_loss(folder: Path, values: Mapping[str, Any]) -> None:
    """Add a line to the folder's record of losses.

    Raises: DataError if it cannot be written.
    """
    path = folder / LOSSES_FILE
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values)) + "\n")


def draw_losses(folder: Path, path: Path) -> None:
    """Draw the losses that were kept, each stage in its colour, from its first step to its last.

    Without any loss yet, nothing is drawn. Raises: DataError if the picture cannot be written.
    """
    source = folder / LOSSES_FILE
    if not source.is_file() or not source.stat().st_size:
        return
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    sheet = Image.new("RGB", CURVE_SIZE, "white")
    draw = ImageDraw.Draw(sheet)
    curves = {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        losses = np.array([line["loss"] for line in lines if line["stage"] == stage])
        width = min(SMOOTHING, len(losses))
        curves[stage] = np.convolve(losses, np.full(width, 1 / width), "valid")
    top = max(float(np.quantile(curve, 0.98)) for curve in curves.values())
    width, height = (side - 2 * MARGIN for side in CURVE_SIZE)
    draw.rectangle((MARGIN, MARGIN, MARGIN + width, MARGIN + height), outline="gray")
    for (stage, curve), colour in zip(curves.items(), ("darkorange", "royalblue"), strict=False):
        across = np.linspace(MARGIN, MARGIN + width, len(curve))
        up = MARGIN + height * (1 - np.clip(curve / top, 0, 1))
        draw.line(list(zip(across.tolist(), up.tolist(), strict=True)), fill=colour, width=2)
        text = f"{stage}: loss {curve[-1]:.3f}, {len(curve)} points"
        draw.text((MARGIN + 8, MARGIN + 8 + 14 * list(curves).index(stage)), text, fill=colour)
    draw.text((4, MARGIN - 6), f"{top:.2f}", fill="black")
    draw.text((16, MARGIN + height - 6), "0", fill="black")
    write_image(path, np.asarray(sheet))

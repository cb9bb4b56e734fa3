"""A look at the world: many clips side by side, as an animated GIF."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..files import whole
from ..images import to_uint8
from .clips import make_clips

COLUMNS, ROWS, SIZE, FRAMES = 8, 5, 96, 9
FRAME_MS = 180


def write_preview(path: Path, *, seed: int) -> None:
    """Write clips of all kinds of events as one GIF that plays forth and back.

    Raises: DataError if the file cannot be written.
    """
    generator = torch.Generator().manual_seed(seed)
    clips = make_clips(COLUMNS * ROWS, size=SIZE, frames=FRAMES, generator=generator, pace="linear")
    # [B, 3, T, H, W] -> one sheet a frame, [T, rows x H, columns x W, 3]
    video = clips.video.reshape(ROWS, COLUMNS, 3, FRAMES, SIZE, SIZE)
    sheets = video.permute(3, 0, 4, 1, 5, 2).reshape(FRAMES, ROWS * SIZE, COLUMNS * SIZE, 3)
    frames = [Image.fromarray(to_uint8(sheet)) for sheet in np.asarray(sheets)]
    frames += frames[-2:0:-1]
    with whole(path) as temporary:
        frames[0].save(
            temporary, "GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0
        )

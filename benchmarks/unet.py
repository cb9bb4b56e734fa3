"""A rival for every task: a small U-Net, trained from scratch on the same pairs.

Axes: N images, B batch, C channels, H W pixels.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewshot_rt.augment import Augmentation
from fewshot_rt.device import arithmetic
from fewshot_rt.images import Floats, Pixels, to_model

WIDTHS = (16, 32, 64, 128)
GROUPS = 8
BATCH = 8
RATE, WARMUP = 5e-3, 20
VARIANTS = 16  # of each pair, as an adapter gets
ANSWER_BATCH = 8


class UNet(nn.Module):
    """Four levels of two convolutions, with skips; half a million parameters.

    Sizes that 8 does not divide are padded by their border.
    Source: Ronneberger et al. 2015; group norm by Wu & He 2018.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _block(before, after) for before, after in zip((3, *WIDTHS), WIDTHS, strict=False)
        )
        self.up = nn.ModuleList(_block(deep + skip, skip) for skip, deep in pairwise(WIDTHS))
        self.head = nn.Conv2d(WIDTHS[0], 3, 1, bias=False)
        self.recolour = nn.Conv2d(3, 3, 1, bias=False)
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))

    @torch.no_grad()
    def begin(self, images: Tensor, targets: Tensor) -> None:
        """Begin with the linear change of colours that fits best, so that the rest is learned.

        Shapes: [N, 3, H, W] in [-1, 1].
        Source: least squares over all pixels.
        """
        given, wanted = (x.movedim(1, -1).reshape(-1, 3).double() for x in (images, targets))
        given = functional.pad(given, (0, 1), value=1.0)
        # A little of the identity keeps gray pictures, whose channels are one, solvable.
        squares = given.T @ given + 1e-6 * len(given) * torch.eye(4, dtype=torch.double)
        weights = torch.linalg.solve(squares, given.T @ wanted)
        self.recolour.weight.copy_(weights[:3].T[..., None, None])
        self.shift.copy_(weights[3][:, None, None])
        self.head.weight.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Give the pictures that follow. Shapes: [B, 3, H, W] in [-1, 1], both."""
        height, width = images.shape[-2:]
        step = 1 << len(self.up)
        values = functional.pad(images, (0, -width % step, 0, -height % step), mode="replicate")
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            values = block(functional.max_pool2d(values, 2) if level else values)
            skips.append(values)
        for level in reversed(range(len(self.up))):
            values = functional.interpolate(values, scale_factor=2.0, mode="bilinear")
            values = self.up[level](torch.cat([values, skips[level]], dim=1))
        found: Tensor = self.recolour(images) + self.shift + self.head(values)[..., :height, :width]
        return found

    @torch.no_grad()
    def answer(self, inputs: Pixels) -> Floats:
        """Answer pictures, as `Codec.decode` takes answers.

        Shapes: inputs uint8 [N, H, W, 3]; result float32 [N, 3, H, W] in about [-1, 1].
        """
        images = _to_tensor(inputs, (inputs.shape[1], inputs.shape[2]))
        with arithmetic(images.device, "fp32"):
            found = [self(batch).float() for batch in torch.split(images, ANSWER_BATCH)]
        values: Floats = torch.cat(found).contiguous().numpy()
        return values


def train_unet(
    inputs: Pixels, targets: Pixels, *, steps: int, seed: int, augmentation: Augmentation
) -> UNet:
    """Train a U-Net from scratch: mean squared error, AdamW, cosine; the same seed, the same net.

    Shapes: inputs, targets uint8 [N, H, W, 3]; targets as `Codec.paint` gives them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet()
    sources, answers = _variants(inputs, targets, augmentation, seed)
    net.begin(sources, answers)
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_pace, steps=steps))
    for index in _batches(len(sources), steps, seed):
        with arithmetic(sources.device, "auto"):
            found = net(sources[index])
        loss = functional.mse_loss(found.float(), answers[index])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return net.eval()


def _pace(step: int, *, steps: int) -> float:
    """Give the share of the learning rate: up over the warm-up, then down along a cosine."""
    return min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, after),
        nn.SiLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, after),
        nn.SiLU(),
    )


def _variants(
    inputs: Pixels, targets: Pixels, augmentation: Augmentation, seed: int
) -> tuple[Tensor, Tensor]:
    """Make the variants that an adapter with this seed gets, all of the size of the pairs."""
    pairs = list(zip(inputs, targets, strict=True))
    variants = augmentation.variants(pairs, count=VARIANTS, seed=seed)
    size = (inputs.shape[1], inputs.shape[2])
    sources, answers = zip(*variants, strict=True)
    return _to_tensor(sources, size), _to_tensor(answers, size)


def _to_tensor(images: Iterable[Pixels], size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.stack([to_model(image, size) for image in images]))


def _batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Draw batches in which every pair comes equally often on the whole."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (BATCH,), generator=generator)

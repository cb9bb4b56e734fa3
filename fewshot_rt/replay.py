"""Encoded clips that are drawn several times before they go.

Axes: B clips, C channels, F latent frames, h w latent grid.
"""

import torch
from torch import Tensor

FULL = 2048  # clips that are kept


class Replay:
    """The latest clips, to draw batches from."""

    def __init__(self) -> None:
        self._latents = torch.empty(0, 0, 0, 0, 0)
        self._words = torch.empty(0, dtype=torch.long)

    def lacks(self, height: int) -> bool:
        """Say whether there are no clips of this latent height yet."""
        return self._latents.shape[-2] != height

    def add(self, latents: Tensor, words: Tensor) -> None:
        """Take clips in and let the oldest go; clips of another size than these all go.

        Shapes: latents [B, C, F, h, w]; words [B, ...].
        """
        if not self.lacks(latents.shape[-2]):
            latents = torch.cat([self._latents, latents])[-FULL:]
            words = torch.cat([self._words, words])[-FULL:]
        self._latents, self._words = latents, words

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw clips, any of them as often as chance has it.

        Shapes: latents [count, C, F, h, w]; words [count, ...].
        """
        device = self._words.device
        chosen = torch.randint(len(self._words), (count,), generator=generator, device=device)
        return self._latents[chosen], self._words[chosen]

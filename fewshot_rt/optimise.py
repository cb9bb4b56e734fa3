"""One optimiser for training and pretraining: warm-up, decay, gradient clip, moving average."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .parallel import average_gradients


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How the learning rate goes: up over `warmup` steps, level, then down to `last` x the rate.

    decay: the share of the run, at its end, in which the rate goes down linearly.
    """

    rate: float
    warmup: int
    decay: float = 0.0
    last: float = 0.05

    def at(self, step: int, progress: float) -> float:
        """Give the learning rate. Units: progress in [0, 1]."""
        up = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        down = 1.0
        if self.decay and progress > 1 - self.decay:
            share = min(1.0, (progress - 1 + self.decay) / self.decay)
            down = 1 - (1 - self.last) * share
        return self.rate * up * down


class Optimiser:
    """AdamW, with Muon for the matrices that are named so, and a moving average of the weights.

    Source: Loshchilov & Hutter 2019 (AdamW); Jordan et al. 2024, Liu et al. 2025 (Muon, with the
    update scaled to AdamW's).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        pace: Pace,
        clip: float = 1.0,
        average: float = 0.0,
        weight_decay: float = 0.0,
        muon: tuple[str, ...] = (),
    ) -> None:
        self.named = dict(named)
        self.pace, self.clip, self.average, self.step_count = pace, clip, average, 0
        matrices = [p for n, p in self.named.items() if p.ndim == 2 and n.startswith(muon)]
        matrices = matrices if muon else []
        chosen = {id(p) for p in matrices}
        others = [p for p in self.named.values() if id(p) not in chosen]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=pace.rate, weight_decay=weight_decay, betas=(0.9, 0.99))
        ]
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=pace.rate,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self.shadow = {n: p.detach().clone() for n, p in self.named.items()} if average else {}

    def step(self, loss: Tensor, *, progress: float = 0.0) -> float:
        """Go one step down the loss; give the norm of the gradient before the clip.

        Raises: ModelError if it is not a number; the weights are then as before.
        """
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(self.named.values())
        norm = nn.utils.clip_grad_norm_(self.named.values(), self.clip)
        if not torch.isfinite(norm):
            raise ModelError(
                f"the gradient became {float(norm)} at loss {float(loss.detach())}: lower --rate."
            )
        rate = self.pace.at(self.step_count, progress)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)
        self.step_count += 1
        self._follow()
        return float(norm)

    def averaged(self) -> dict[str, Tensor]:
        """Give the averaged weights by name, or the weights themselves without an average."""
        if self.average:
            return self.shadow
        return {name: value.detach() for name, value in self.named.items()}

    def state_dict(self) -> dict[str, Any]:
        """Give all that resuming needs besides the weights."""
        parts = [part.state_dict() for part in self._parts]
        return {"parts": parts, "steps": self.step_count, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for part, values in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(values)
        self.step_count = state["steps"]
        self.shadow = {n: v.to(self.named[n].device) for n, v in state["shadow"].items()}

    @torch.no_grad()
    def _follow(self) -> None:
        if not self.average:
            return
        # Early on, the average follows faster, so that it does not remember the start.
        keep = min(self.average, (1 + self.step_count) / (10 + self.step_count))
        shadows = list(self.shadow.values())
        weights = [p.detach() for p in self.named.values()]
        torch._foreach_lerp_(shadows, weights, 1 - keep)

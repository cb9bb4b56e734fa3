"""Train an adapter from a few pairs: latents once, then a loop that yields its steps.

Axes: B batch, C channels, F latent frames, h w latent grid.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from .adapter import Provenance, add_lora
from .augment import Augmentation
from .base import Base
from .device import arithmetic
from .latents import embed_prompt, encode_task
from .objectives import Loss, Predict, choose_loss
from .optimise import Optimiser, Pace
from .parallel import agree, own_rank
from .state import load_state, save_state, uninterrupted
from .task import Task
from .train_config import TrainConfig
from .versions import versions

STATE_FILE = "state/train.pt"


@dataclass(frozen=True)
class TrainStep:
    """What one update tells. Units: progress in [0, 1]; seconds of training left, estimated.

    stage: "train"; "trial" of an adapter that is only tried and then let go; "try" when `step`
    denoising steps were tried; "walk" of a teacher.
    """

    step: int
    loss: float
    progress: float
    seconds_left: float
    gradient_norm: float
    stage: str = "train"


Trainable = Callable[[Base], list[tuple[str, nn.Parameter]]]
BatchLoss = Callable[[Predict, dict[str, Tensor], torch.Generator], Tensor]


@dataclass(frozen=True)
class Lesson:
    """What is learned from: tensors of N clips by name, and the loss of a batch of them.

    own: the names that the loss takes; all others are conditions of the denoiser, as is the prompt.
    """

    encoded: dict[str, Tensor]
    own: tuple[str, ...]
    prompt: dict[str, Tensor]
    loss: BatchLoss


def train(
    base: Base,
    task: Task,
    config: TrainConfig,
    folder: Path,
    *,
    cache: Path,
    trainable: Trainable | None = None,
    begun: Path | None = None,
) -> Iterator[TrainStep]:
    """Train an adapter on the pairs of a task and leave it attached to the base; see `learn`."""
    lesson = Lesson(
        encoded=encode_pairs(base, task, config, cache=cache),
        own=("clean",),
        prompt=embed_prompt(base, task.prompt, cache=cache),
        loss=_of_clips(choose_loss(config, base), base),
    )
    base.rest()
    yield from learn(base, lesson, config, folder, trainable=trainable, begun=begun)


def learn(
    base: Base,
    lesson: Lesson,
    config: TrainConfig,
    folder: Path,
    *,
    trainable: Trainable | None = None,
    begun: Path | None = None,
) -> Iterator[TrainStep]:
    """Minimise the loss of a lesson, and leave what was trained attached to the base.

    trainable: gives the parameters to train, by name, in place of a fresh adapter's.
    begun: where the state is to go on from, if not in the folder.
    Goes on from the state, if there is one; saves it every so often, at the end, and when the loop
    is left early (Ctrl-C). Step 0 is yielded before the first update. Under torchrun every process
    draws batches of its own, and all step as one.
    Raises: ModelError if the gradient stops being a number.
    """
    loop = _Loop(base, lesson, config, trainable)
    loop.resume((begun or folder) / STATE_FILE)
    yield TrainStep(loop.step_count, float("nan"), loop.progress(), loop.seconds_left(), 0.0)
    saved = time.monotonic()
    try:
        while agree(loop.progress()) < 1:
            with uninterrupted():
                step = loop.update()
            yield step
            if time.monotonic() - saved > config.save_seconds:
                loop.save(folder / STATE_FILE)
                saved = time.monotonic()
    finally:
        with uninterrupted():
            loop.save(folder / STATE_FILE)
    loop.take_average()


def make_provenance(base: Base, task: Task, config: TrainConfig, *, steps: int) -> Provenance:
    """Write down where an adapter comes from."""
    return Provenance(
        base=base.name,
        revision=base.revision,
        task=task.name,
        digest=task.digest(),
        shots=len(task.pairs),
        seed=config.seed,
        objective=config.objective,
        steps=steps,
        versions=versions(),
    )


def parse_augmentation(config: TrainConfig, task: Task) -> Augmentation:
    """Give the variants that the pairs of a task for training get.

    Raises: ConfigError for an unknown kind; DataError if a pair cannot be read.
    """
    return Augmentation.parse(config.augment, codec=task.codec.name, pairs=task.load_pairs())


def encode_pairs(base: Base, task: Task, config: TrainConfig, *, cache: Path) -> dict[str, Tensor]:
    """Encode the videos to train on, or read them from the cache; see `encode_task`."""
    return encode_task(
        base,
        task,
        size=config.pixels(base.geometry.native),
        augmentation=parse_augmentation(config, task),
        variants=config.variants,
        seed=config.seed,
        cache=cache,
    )


def _of_clips(loss: Loss, base: Base) -> BatchLoss:
    """Let a loss of clean latents take a batch."""

    def of_batch(predict: Predict, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return loss(base.schedule, predict, batch["clean"], generator, base.geometry.known_frames)

    return of_batch


class _Loop:
    """The adapter, its optimiser and its data, and how they are saved."""

    def __init__(
        self, base: Base, lesson: Lesson, config: TrainConfig, trainable: Trainable | None
    ) -> None:
        self.base, self.lesson, self.config = base, lesson, config
        self.suited = suited = config.suited(base.suited)
        adapter = partial(add_lora, rank=suited.rank, alpha=suited.alpha, seed=config.seed)
        for module in base.denoiser().modules() if suited.checkpointing else ():
            if isinstance(module, ModelMixin):
                module.enable_gradient_checkpointing()
        self.optimiser = Optimiser(
            (trainable or adapter)(base),
            pace=Pace(rate=suited.rate, warmup=config.warmup, decay=0.3),
            clip=suited.clip,
            average=config.average,
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.seconds = 0.0
        self._draw_apart()

    @property
    def step_count(self) -> int:
        return self.optimiser.step_count

    def progress(self) -> float:
        """Say how much of the steps, or of the minutes if they end sooner, is done."""
        by_steps = self.step_count / self.config.steps
        minutes = self.config.minutes
        by_time = self.seconds / (60 * minutes) if minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def seconds_left(self) -> float:
        """Estimate the seconds of training left; not a number before the first step."""
        progress = self.progress()
        return self.seconds * (1 - progress) / progress if progress else float("nan")

    def update(self) -> TrainStep:
        """Draw a batch and go one step down its loss."""
        started = time.monotonic()
        with arithmetic(self.base.device, self.config.precision):
            loss = self._loss(self._draw())
        norm = self.optimiser.step(loss, progress=self.progress())
        self.seconds += time.monotonic() - started
        value = float(loss.detach())
        return TrainStep(self.step_count, value, self.progress(), self.seconds_left(), norm)

    def _draw(self) -> dict[str, Tensor]:
        """Draw a batch in which pairs come equally often, each in any variant."""
        encoded = self.lesson.encoded
        count = len(encoded[self.lesson.own[0]])
        index = torch.randint(count, (self.suited.batch,), generator=self.generator)
        return {name: v[index].to(self.base.device) for name, v in encoded.items()}

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        own = {name: batch.pop(name) for name in self.lesson.own}
        denoiser = self.base.denoiser()

        def predict(noisy: Tensor, moment: Tensor) -> Tensor:
            prediction: Tensor = denoiser(noisy, moment, **batch, **self.lesson.prompt)
            return prediction.float()

        return self.lesson.loss(predict, own, self.generator)

    def resume(self, path: Path) -> None:
        if path.is_file():
            load_state(path, self._take, mend="Train again with --overwrite.")

    @torch.no_grad()
    def _take(self, state: dict[str, Any]) -> None:
        for name, parameter in self.optimiser.named.items():
            parameter.copy_(state["weights"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.seconds = state["seconds"]
        self._draw_apart()

    def _draw_apart(self) -> None:
        """Let every process but the first draw batches and noise of its own."""
        rank = own_rank()
        if rank:
            self.generator.manual_seed(self.config.seed + 1_000_003 * rank + self.step_count)

    def save(self, path: Path) -> None:
        state = {
            "weights": {name: p.detach() for name, p in self.optimiser.named.items()},
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "seconds": self.seconds,
        }
        save_state(path, state)

    @torch.no_grad()
    def take_average(self) -> None:
        for name, value in self.optimiser.averaged().items():
            self.optimiser.named[name].copy_(value)

"""Pretrain a base like pocket on the procedural world: first the autoencoder, then the denoiser.

Axes: B batch, C channels, T frames, H W pixels, F latent frames, h w latent grid.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from .autoencoder import AutoencoderConfig, TinyVideoAutoencoder
from .base_files import write_base
from .bases.pocket import PATCHES, TRANSFORMER, PocketBase, open_base
from .config import to_dict
from .device import arithmetic, pick_device
from .errors import ConfigError, ModelError, unknown
from .optimise import Optimiser, Pace
from .parallel import agree, join, leave
from .pretrain_config import PretrainConfig
from .pretrain_losses import WordDenoiser, denoising_loss, reconstruction_loss
from .pretrain_panels import append_loss, draw_losses, write_samples
from .replay import Replay
from .state import load_state, save_state, uninterrupted
from .world import EVENTS, VOCABULARY, Clips, make_clips

FRAMES = 5
STAGES = ("autoencoder", "denoiser")
STATE_FILE = "state/pretrain.pt"
# Clips are made this many at once, at least, and fewer where they are large: a few at a time cost
# more each.
MADE_AT_ONCE, MADE_PIXELS = 32, 32 * 64 * 64


@dataclass(frozen=True)
class PretrainStep:
    """What one step of pretraining tells. Units: progress of the stage in [0, 1]."""

    stage: str
    step: int
    loss: float
    progress: float
    seconds: float
    clips_per_second: float


@dataclass
class _Clock:
    """Time that the stages have used, over all resumed parts."""

    spent: dict[str, float]

    def progress(self, stage: str, config: PretrainConfig, *, is_taken: bool) -> float:
        """Give the share of a stage's time. is_taken: the autoencoder needs none."""
        share = 0.0 if is_taken else config.autoencoder_share
        share = share if stage == "autoencoder" else 1 - share
        budget = 60 * config.minutes * share
        return self.spent[stage] / budget if budget else 1.0


def pretrain(config: PretrainConfig, folder: Path) -> Iterator[PretrainStep]:
    """Pretrain in a folder, going on from the state that is there; yield after every step.

    At the end, at checkpoints, and when it is left early (Ctrl-C), the state is saved; after the
    autoencoder's stage the folder is then a base that `train --base FOLDER` takes.
    Raises: ConfigError if a setting does not fit; ModelError if the folder holds a run with other
    sizes, a base is missing or does not fit, or a gradient is no number.
    """
    config = replace(config, device=pick_device(config.device))
    rank, count = join(config.device)
    try:
        run = _Run(config, folder, rank=rank, processes=count)
        run.resume()
        run.part_ways()
        try:
            for stage in STAGES:
                # Once its latents are measured, the autoencoder is frozen.
                if stage == "denoiser" or not run.autoencoder.config.latents_std:
                    yield from _train_stage(run, stage)
                    run.finish(stage)
        finally:
            with uninterrupted():
                run.save()
    finally:
        leave()


def _train_stage(run: "_Run", stage: str) -> Iterator[PretrainStep]:
    config = run.config
    last_save = time.monotonic()
    while (progress := agree(run.progress(stage))) < 1:
        started = time.monotonic()
        with uninterrupted():
            loss, clips = run.step(stage, progress)
        seconds = time.monotonic() - started
        run.clock.spent[stage] += seconds
        count = run.optimisers[stage].step_count
        step = PretrainStep(stage, count, loss, progress, seconds, clips / seconds)
        run.note(step)
        yield step
        if time.monotonic() - last_save > 60 * config.save_minutes:
            run.save()
            last_save = time.monotonic()


class _Run:
    """The networks, their optimisers, and how they are saved."""

    def __init__(self, config: PretrainConfig, folder: Path, *, rank: int, processes: int) -> None:
        torch.manual_seed(config.seed)
        if config.batch // 4 % processes:
            raise ConfigError(
                f"a quarter of the batch, {config.batch // 4}, is not shared evenly by {processes} "
                f"processes: give --batch {4 * processes * max(1, config.batch // 4 // processes)}."
            )
        self.config, self.folder = config, folder
        self.events = _events(config)
        self.rank, self.processes = rank, processes
        self.clock = _Clock(dict.fromkeys(STAGES, 0.0))
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        self.origin: dict[str, Any] = {"autoencoder_from": "", "initialised_from": []}
        # A state holds all that the first weights came to.
        is_new = not (folder / STATE_FILE).is_file()
        first = open_base(config.init, device=config.device) if config.init and is_new else None
        self.autoencoder = first.autoencoder if first else self._make_autoencoder()
        self.autoencoder.requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.replay = Replay()
        self.owed = 0.0  # clips that were drawn and not yet made anew
        self.transformer_config = TRANSFORMER | {
            "num_layers": config.layers,
            "num_attention_heads": config.heads,
        }
        transformer = WanTransformer3DModel.from_config(self.transformer_config)
        self.denoiser = WordDenoiser(transformer, TRANSFORMER["text_dim"]).to(config.device)
        if first:
            self._initialise_from(first)
        self.optimisers = self._optimisers()
        self._predict: Callable[..., Tensor] = (
            torch.compile(self.denoiser, dynamic=False) if config.compile else self.denoiser
        )

    def _make_autoencoder(self) -> TinyVideoAutoencoder:
        """Take that of another base, or begin with principal components of the world."""
        config = self.config
        if config.autoencoder:
            taken = open_base(config.autoencoder, device=config.device)
            self.origin["autoencoder_from"] = f"{taken.name}, revision {taken.revision}"
            autoencoder: TinyVideoAutoencoder = taken.autoencoder
            channels = autoencoder.config.latent_channels
            if channels != TRANSFORMER["out_channels"]:
                raise ModelError(
                    f"the autoencoder of {config.autoencoder} has {channels} channels, and the "
                    f"denoiser is made for {TRANSFORMER['out_channels']} channels. Take another."
                )
        else:
            autoencoder = TinyVideoAutoencoder(AutoencoderConfig()).to(config.device)
            fit_on = make_clips(64, size=config.native // 2, generator=self.generator, frames=2)
            autoencoder.fit_shortcut(fit_on.video.transpose(1, 2).flatten(0, 1))
        return autoencoder

    def _initialise_from(self, base: PocketBase) -> None:
        """Take all weights of a base; words that it does not know stay as they were drawn.

        Raises: ModelError if it has other sizes.
        """
        try:
            taken = dict(base.denoiser().transformer.state_dict())
            transformer = self.denoiser.denoiser.transformer
            # Waves that the base lacks begin as they were drawn.
            before, own = taken[PATCHES], transformer.get_parameter(PATCHES).detach()
            taken[PATCHES] = torch.cat([before, own[:, before.shape[1] :]], dim=1)
            transformer.load_state_dict(taken)
        except RuntimeError as error:
            raise ModelError(
                f"the base {self.config.init} has other sizes ({error}). Give the --layers and "
                "--heads that it was begun with, or another base."
            ) from error
        with torch.no_grad():
            for word, embedding in zip(base.prompts.words, base.prompts.embeddings, strict=True):
                if word in VOCABULARY:
                    self.denoiser.words.weight[VOCABULARY.index(word)] = embedding
        name = f"{base.name}, revision {base.revision}"
        before = [f"{name}{_work(base.index)}", *base.index.get("initialised_from", [])]
        self.origin = {"autoencoder_from": name, "initialised_from": before}

    def _optimisers(self) -> dict[str, Optimiser]:
        config = self.config
        return {
            "autoencoder": Optimiser(
                self.autoencoder.named_parameters(),
                pace=Pace(rate=config.autoencoder_rate, warmup=50, decay=0.3),
                average=0.995,
            ),
            "denoiser": Optimiser(
                self.denoiser.named_parameters(),
                pace=Pace(rate=config.rate, warmup=100, decay=0.3),
                average=0.998,
                weight_decay=0.01,
                muon=("denoiser.transformer.blocks.",),
            ),
        }

    def progress(self, stage: str) -> float:
        """Say how much of a stage is done, in [0, 1] or beyond."""
        is_taken = bool(self.origin["autoencoder_from"])
        return self.clock.progress(stage, self.config, is_taken=is_taken)

    def step(self, stage: str, progress: float) -> tuple[float, int]:
        """Do one step; give the loss and the number of clips."""
        at_native = stage == "denoiser" and progress >= self.config.half_share
        size = self.config.native if at_native else self.config.native // 2
        quarter = at_native or stage == "autoencoder"
        batch = max(1, self.config.batch // (4 if quarter else 1) // self.processes)
        with arithmetic(torch.device(self.config.device), "auto"):
            if stage == "autoencoder":
                video = self._clips(batch, size).video
                loss = reconstruction_loss(self.autoencoder, video, generator=self.generator)
            else:
                self._refill(batch, size)
                clips = self.replay.draw(batch, self.generator)
                loss = denoising_loss(
                    self._predict, clips, config=self.config, generator=self.generator
                )
        self.optimisers[stage].step(loss, progress=progress)
        return float(loss.detach()), batch * self.processes

    def _clips(self, count: int, size: int) -> Clips:
        return make_clips(
            count, size=size, frames=FRAMES, generator=self.generator, events=self.events
        )

    @torch.no_grad()
    def _refill(self, batch: int, size: int) -> None:
        """Make as many new clips as the steps use up, many at once; some more at first."""
        grid = size // self.autoencoder.config.space_factor
        self.owed += batch / self.config.repeats
        least = max(1, min(MADE_AT_ONCE, MADE_PIXELS // size**2))
        if self.replay.lacks(grid):
            self.owed = max(4 * batch, least)
        if self.owed < least:
            return
        count = int(self.owed)
        self.owed -= count
        clips = self._clips(count, size)
        self.replay.add(self.autoencoder.encode(clips.video).float(), clips.words)

    def finish(self, stage: str) -> None:
        """Take the averaged weights; after the autoencoder, measure its latents, then freeze it."""
        if stage == "autoencoder" and not self.autoencoder.config.latents_std:
            _take(self.autoencoder, self.optimisers[stage].averaged())
            self._measure_latents()
            self.save()

    @torch.no_grad()
    def _measure_latents(self) -> None:
        generator = torch.Generator(self.config.device).manual_seed(self.config.seed + 1)
        clips = [
            make_clips(16, size=self.config.native // 2, generator=generator) for _ in range(8)
        ]
        latents = torch.cat([self.autoencoder.encode(clip.video) for clip in clips])
        mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
        # Between the scale of pixels and unit variance: fine detail counts, but does not rule.
        scale = (std * std.mean()).sqrt()
        self._set_latents(tuple(mean.tolist()), tuple(scale.tolist()))

    def _set_latents(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        autoencoder = self.autoencoder
        autoencoder.config = replace(autoencoder.config, latents_mean=mean, latents_std=std)
        if mean:
            autoencoder.mean.copy_(torch.tensor(mean).view(-1, 1, 1))
            autoencoder.std.copy_(torch.tensor(std).view(-1, 1, 1))

    def resume(self) -> None:
        """Go on from a saved state, if there is one."""
        path = self.folder / STATE_FILE
        if not path.is_file():
            return
        mend = "Give the --layers and --heads that it was begun with, or another folder."
        load_state(path, self._restore, mend=mend)

    def _restore(self, state: dict[str, Any]) -> None:
        self.autoencoder.load_state_dict(state["autoencoder"])
        self.denoiser.load_state_dict(state["denoiser"])
        for stage, values in state["optimisers"].items():
            self.optimisers[stage].load_state_dict(values)
        self.optimisers["autoencoder"].step_count = state["autoencoder_steps"]
        self._set_latents(tuple(state["latents_mean"]), tuple(state["latents_std"]))
        self.clock.spent.update(state["spent"])
        self.origin = state["origin"]
        if state["device"] == self.config.device:
            self.generator.set_state(state["generator"])
        else:
            self._draw_others(0)

    def part_ways(self) -> None:
        """Let every process but the first draw other clips than it does."""
        if self.rank:
            self._draw_others(self.rank)

    def _draw_others(self, number: int) -> None:
        """Draw other clips from now on than before, and than with another number."""
        count = sum(optimiser.step_count for optimiser in self.optimisers.values())
        self.generator.manual_seed(1000 * (self.config.seed + 1) * (count + 1) + number)

    def note(self, step: PretrainStep) -> None:
        """Keep every tenth step for the curve of losses."""
        if self.rank == 0 and step.step % 10 == 0:
            append_loss(self.folder, asdict(step))

    def save(self) -> None:
        """Write the state, the base as it is now (averaged weights), and a panel of samples."""
        if self.rank:
            return
        config = self.autoencoder.config
        # The optimiser of a frozen autoencoder is of no more use.
        trained = STAGES[1:] if config.latents_std else STAGES
        state = {
            "autoencoder": self.autoencoder.state_dict(),
            "denoiser": self.denoiser.state_dict(),
            "optimisers": {stage: self.optimisers[stage].state_dict() for stage in trained},
            "autoencoder_steps": self.optimisers["autoencoder"].step_count,
            "latents_mean": list(config.latents_mean),
            "latents_std": list(config.latents_std),
            "spent": self.clock.spent,
            "origin": self.origin,
            "device": self.config.device,
            "generator": self.generator.get_state(),
        }
        save_state(self.folder / STATE_FILE, state)
        draw_losses(self.folder, self.folder / "panels" / "losses.png")
        if config.latents_std:
            self._write_base()
            steps = self.optimisers["denoiser"].step_count
            write_samples(self.folder, self.folder / "panels" / f"{steps:06d}.png")

    def _write_base(self) -> None:
        """Write the averaged weights as a base."""
        averaged = dict(self.optimisers["denoiser"].averaged())
        words = averaged.pop("words.weight")
        prefix = "denoiser.transformer."
        # Buffers (none are saved by this family) stay in the module itself.
        weights = {name.removeprefix(prefix): value for name, value in averaged.items()}
        write_base(
            self.folder,
            weights=weights,
            transformer=self.transformer_config,
            autoencoder=self.autoencoder,
            words=words,
            index={
                "name": self.config.name,
                "native": [self.config.native, self.config.native],
                "licence": "Apache-2.0",
                **self.origin,
                "steps": {name: o.step_count for name, o in self.optimisers.items()},
                "minutes": {n: round(value / 60, 1) for n, value in self.clock.spent.items()},
                # Whose weights were taken stands above, by name: folders are this machine's own.
                "settings": {
                    name: value
                    for name, value in to_dict(self.config).items()
                    if name not in ("init", "autoencoder")
                },
            },
        )


def _work(index: dict[str, Any]) -> str:
    """Say what went into a base, as far as it tells, to go behind its name."""
    steps, minutes = (index.get(name, {}).get("denoiser") for name in ("steps", "minutes"))
    events = index.get("settings", {}).get("events")
    work = f": {steps} steps in {minutes} minutes" if steps else ""
    return work + (f", only {events.replace(',', ', ')}" if events else "")


def _events(config: PretrainConfig) -> tuple[str, ...]:
    """Give the events to play.

    Raises: ConfigError for an unknown one.
    """
    names = tuple(part.strip() for part in config.events.split(",")) if config.events else ()
    for name in names:
        if name not in EVENTS:
            raise ConfigError(unknown("event", name, EVENTS))
    return names or tuple(EVENTS)


def _take(module: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])

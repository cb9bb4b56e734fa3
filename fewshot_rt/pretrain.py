"""Pretrain a base like pocket on the procedural world: first the autoencoder, then the denoiser.

Axes: B batch, C channels, T frames, H W pixels, F latent frames, h w latent grid.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from .autoencoder import AutoencoderConfig, TinyVideoAutoencoder
from .bases.pocket import PROMPT_WORDS, TRANSFORMER, WEIGHT_FILE, PocketDenoiser, open_base
from .config import to_dict
from .device import arithmetic, pick_device
from .files import whole, write_json, write_text
from .images import montage, to_uint8, write_image
from .optimise import Optimiser, Pace
from .pretrain_config import PretrainConfig
from .sample import sample
from .schedule import Schedule
from .state import load_state, save_state, uninterrupted
from .world import VOCABULARY, make_clips

FRAMES = 5
STAGES = ("autoencoder", "denoiser")


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

    def progress(self, stage: str, config: PretrainConfig) -> float:
        share = config.autoencoder_share
        share = share if stage == "autoencoder" else 1 - share
        budget = 60 * config.minutes * share
        return self.spent[stage] / budget if budget else 1.0


def pretrain(config: PretrainConfig, folder: Path) -> Iterator[PretrainStep]:
    """Pretrain in a folder, going on from the state that is there; yield after every step.

    At the end, at checkpoints, and when it is left early (Ctrl-C), the state is saved; after the
    autoencoder's stage the folder is then a base that `train --base FOLDER` takes.
    Raises: ModelError if the folder holds a run with other sizes, or a gradient is no number.
    """
    run = _Run(replace(config, device=pick_device(config.device)), folder)
    run.resume()
    try:
        for stage in STAGES:
            # Once its latents are measured, the autoencoder is frozen: the denoiser learns them.
            if stage == "denoiser" or not run.autoencoder.config.latents_std:
                yield from _train_stage(run, stage)
                run.finish(stage)
    finally:
        with uninterrupted():
            run.save()


def _train_stage(run: "_Run", stage: str) -> Iterator[PretrainStep]:
    config = run.config
    last_save = time.monotonic()
    while (progress := run.clock.progress(stage, config)) < 1:
        started = time.monotonic()
        with uninterrupted():
            loss, clips = run.step(stage, progress)
        seconds = time.monotonic() - started
        run.clock.spent[stage] += seconds
        count = run.optimisers[stage].step_count
        yield PretrainStep(stage, count, loss, progress, seconds, clips / seconds)
        if time.monotonic() - last_save > 60 * config.save_minutes:
            run.save()
            last_save = time.monotonic()


class _Run:
    """The networks, their optimisers, and how they are saved."""

    def __init__(self, config: PretrainConfig, folder: Path) -> None:
        torch.manual_seed(config.seed)
        self.config, self.folder = config, folder
        self.clock = _Clock(dict.fromkeys(STAGES, 0.0))
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        self.schedule = Schedule(kind="flow")
        self.autoencoder = TinyVideoAutoencoder(AutoencoderConfig()).to(config.device)
        fit_on = make_clips(64, size=config.native // 2, generator=self.generator, frames=2)
        self.autoencoder.fit_shortcut(fit_on.video.transpose(1, 2).flatten(0, 1))
        self.autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.transformer_config = TRANSFORMER | {
            "num_layers": config.layers,
            "num_attention_heads": config.heads,
        }
        transformer = WanTransformer3DModel.from_config(self.transformer_config)
        self.denoiser = _WordDenoiser(transformer, TRANSFORMER["text_dim"]).to(config.device)
        self.optimisers = self._optimisers()
        self._predict: Callable[..., Tensor] = (
            torch.compile(self.denoiser, dynamic=False) if config.compile else self.denoiser
        )

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

    def step(self, stage: str, progress: float) -> tuple[float, int]:
        """Do one step; give the loss and the number of clips."""
        at_native = stage == "denoiser" and progress >= self.config.half_share
        size = self.config.native if at_native else self.config.native // 2
        batch = self.config.batch // 4 if at_native or stage == "autoencoder" else self.config.batch
        clips = make_clips(batch, size=size, frames=FRAMES, generator=self.generator)
        with arithmetic(torch.device(self.config.device), "auto"):
            loss = self._reconstruction(clips.video) if stage == "autoencoder" else None
            if loss is None:
                loss = self._denoising(clips.video, clips.words)
        self.optimisers[stage].step(loss, progress=progress)
        return float(loss.detach()), batch

    def _reconstruction(self, video: Tensor) -> Tensor:
        """Absolute error of pixels and of their differences, with a little noise on latents."""
        latents = self.autoencoder.encode(video)
        noise = torch.randn(latents.shape, generator=self.generator, device=latents.device)
        restored = self.autoencoder.decode(latents + 0.02 * noise).float()
        error = restored - video
        edges = sum(error.diff(dim=dim).abs().mean() for dim in (-1, -2))
        spread = functional.relu(latents.float().abs() - 2).square().mean()
        return error.abs().mean() + 0.5 * edges + 0.1 * spread

    def _denoising(self, video: Tensor, words: Tensor) -> Tensor:
        """The flow-matching loss on the frames after the first.

        A share of the clips is at pure noise, half of these with the noise left out: the state from
        which one-step adapters start.
        """
        with torch.no_grad():
            latents = self.autoencoder.encode(video).float()
        batch, device = latents.shape[0], latents.device
        draw = torch.rand((3, batch), generator=self.generator, device=device)
        normal = torch.randn((batch,), generator=self.generator, device=device)
        noise = torch.randn(latents.shape, generator=self.generator, device=device)
        at_end = draw[0] < self.config.pure_noise
        moment = torch.where(at_end, 1.0, torch.sigmoid(normal).clamp(0.01, 1))
        noise = noise * (~(draw[0] < self.config.pure_noise / 2))[:, None, None, None, None]
        words = torch.where(draw[1] < self.config.silent_words, 0, words)
        noisy = self.schedule.noise(latents, noise, moment)
        prediction = self._predict(noisy, moment, latents[:, :, :1], words)
        target = self.schedule.target(latents, noise, moment)
        return functional.mse_loss(prediction.float()[:, :, 1:], target[:, :, 1:])

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
        path = self.folder / "state" / "pretrain.pt"
        if not path.is_file():
            return
        mend = "Give the --layers and --heads that it was begun with, or another folder."
        load_state(path, self._take, mend=mend)

    def _take(self, state: dict[str, Any]) -> None:
        self.autoencoder.load_state_dict(state["autoencoder"])
        self.denoiser.load_state_dict(state["denoiser"])
        for stage in STAGES:
            self.optimisers[stage].load_state_dict(state["optimisers"][stage])
        self._set_latents(tuple(state["latents_mean"]), tuple(state["latents_std"]))
        self.clock.spent.update(state["spent"])
        self.generator.set_state(state["generator"])

    def save(self) -> None:
        """Write the state, the base as it is now (averaged weights), and a panel of samples."""
        config = self.autoencoder.config
        state = {
            "autoencoder": self.autoencoder.state_dict(),
            "denoiser": self.denoiser.state_dict(),
            "optimisers": {name: o.state_dict() for name, o in self.optimisers.items()},
            "latents_mean": list(config.latents_mean),
            "latents_std": list(config.latents_std),
            "spent": self.clock.spent,
            "generator": self.generator.get_state(),
        }
        save_state(self.folder / "state" / "pretrain.pt", state)
        if config.latents_std:
            self._write_base()
            _write_panel(self.folder, steps=self.optimisers["denoiser"].step_count)

    def _write_base(self) -> None:
        """Write the averaged weights as a diffusers-format folder in fp16."""
        config = self.config
        averaged = dict(self.optimisers["denoiser"].averaged())
        words = averaged.pop("words.weight")
        prefix = "denoiser.transformer."
        # Buffers (none are saved by this family) stay in the module itself.
        weights = {name.removeprefix(prefix): value for name, value in averaged.items()}
        _write_weights(self.folder / "transformer" / WEIGHT_FILE, weights)
        _write_weights(self.folder / "vae" / WEIGHT_FILE, self.autoencoder.state_dict())
        _write_weights(self.folder / "prompt" / "embeddings.safetensors", {"embeddings": words})
        write_json(self.folder / "prompt" / "words.json", list(VOCABULARY))
        write_json(self.folder / "vae" / "config.json", self.autoencoder.config.to_dict())
        write_json(
            self.folder / "transformer" / "config.json",
            {"_class_name": "WanTransformer3DModel"} | self.transformer_config,
        )
        steps = {name: o.step_count for name, o in self.optimisers.items()}
        index = {
            "name": config.name,
            "revision": _digest(weights | self.autoencoder.state_dict() | {"words": words}),
            "native": [config.native, config.native],
            "licence": "Apache-2.0",
            "steps": steps,
            "minutes": {name: round(value / 60, 1) for name, value in self.clock.spent.items()},
            "settings": to_dict(config),
        }
        write_json(self.folder / "model_index.json", index)
        write_text(self.folder / "README.md", _card(index))


class _WordDenoiser(nn.Module):
    """The denoiser with the table of words in front, so that both are trained as one."""

    def __init__(self, transformer: WanTransformer3DModel, width: int) -> None:
        super().__init__()
        self.denoiser = PocketDenoiser(transformer)
        self.words = nn.Embedding(len(VOCABULARY), width)

    def forward(self, noisy: Tensor, moment: Tensor, first: Tensor, words: Tensor) -> Tensor:
        """Shapes: noisy [B, C, F, h, w]; moment, words [B]; first [B, C, 1, h, w]."""
        silent = torch.zeros_like(words)[:, None].expand(-1, PROMPT_WORDS - 1)
        prompt = self.words(torch.cat([words[:, None], silent], dim=1))
        prediction: Tensor = self.denoiser(noisy, moment, first, prompt)
        return prediction


def _take(module: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])


def _write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    with whole(path) as temporary:
        save_file({k: v.detach().cpu().half().contiguous() for k, v in weights.items()}, temporary)


def _digest(weights: dict[str, Tensor]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def _write_panel(folder: Path, *, steps: int) -> None:
    """Show for a few events: first frame | what one step and four steps make of it | last frame."""
    base = open_base(str(folder))
    generator = torch.Generator().manual_seed(7)
    rows = []
    for event in ("silhouette", "outline", "depth", "labels", "mirror", "vanish", "drain", "focus"):
        size = base.geometry.native[0]
        video = make_clips(
            1, size=size, generator=generator, event=event, pace="repeat_target"
        ).video
        conditions = base.condition(video[:, :, 0]) | base.embed(event)
        latents = base.encode(video)
        answers = [
            _answer(base, torch.zeros_like(latents), conditions, steps=1),
            _answer(base, torch.randn(latents.shape, generator=generator), conditions, steps=4),
            base.decode_last(latents),
        ]
        pictures = [video[:, :, 0], *answers, video[:, :, -1]]
        rows.append([to_uint8(p[0].numpy().transpose(1, 2, 0)) for p in pictures])
    headings = ["first", "1 step", "4 steps", "autoencoder", "last"]
    write_image(folder / "panels" / f"{steps:06d}.png", montage(rows, headings=headings))


def _answer(base: Any, noise: Tensor, conditions: dict[str, Tensor], *, steps: int) -> Tensor:
    denoiser = base.denoiser()
    *_, last = sample(
        lambda x, t: denoiser(x, t, **conditions), noise, schedule=base.schedule, steps=steps
    )
    answer: Tensor = base.decode_last(last.latents)
    return answer


def _card(index: dict[str, Any]) -> str:
    minutes, steps, settings = index["minutes"], index["steps"], index["settings"]
    return f"""---
license: apache-2.0
library_name: diffusers
tags: [image-to-video, few-shot, fewshot-rt]
---

# {index["name"]} (revision {index["revision"]})

A small image-to-video diffusion model for few-shot adapters, made by `fewshot-rt pretrain`: the
transformer of the Wan TI2V family (clean first frame at time 0, flow matching) over the latents of
a tiny frame-wise video autoencoder. Native size {index["native"][0]}x{index["native"][1]}, 5 or 9
frames.

- **Data**: only the procedural world of `fewshot_rt.world` ({len(VOCABULARY) - 1} events); no
  photographs, no downloaded data.
- **Training**: autoencoder {steps["autoencoder"]} steps in {minutes["autoencoder"]} minutes,
  denoiser {steps["denoiser"]} steps in {minutes["denoiser"]} minutes on {settings["device"]}; batch
  {settings["batch"]} at half size, then {settings["batch"] // 4} at native size.
- **Prompts**: the words in `prompt/words.json`; all others say nothing.
- **Use**: adapters from a few pairs. By itself it is a toy.
- **Kept out on purpose**: vertical flip, jigsaw, keypoints.

Settings: `{json.dumps(settings)}`
"""

"""From a picture's file to its answer's file: ours, and the official pipeline of diffusers.

Both run the same networks with random weights; that they answer the same is tested on tiny ones,
in the tests of the families. Ours takes its first-order sampler and no guidance. The paper's
setting is 49 frames, 50 steps and guidance; only a few of its steps are timed, unless there is time
for all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewshot_rt.autoencoder import AutoencoderConfig
from fewshot_rt.codecs import Codec
from fewshot_rt.errors import EngineError
from fewshot_rt.images import from_model, read_image, to_model, to_uint8, write_image
from fewshot_rt.predictor import Predictor, Recipe
from fewshot_rt.runs import base_predictor
from fewshot_rt.taehv import BLOCKS, SPACE, Taehv

from .gpu_bases import Subject
from .gpu_clock import time_in_turns
from .gpu_compiled import Denoising, Variant, open_random, recorded
from .gpu_denoiser import EAGER, GRAPH, TOO_LATE, VARIANT_SECONDS, judge, refusal
from .gpu_official import GUIDANCE, LEAST_STEPS, Official, Setting
from .gpu_units import Stage, Unit, attempt, list_bases
from .record import Record

KIND = "gpu-answer"
STEPS = (1, 4)
ROUNDS = 5
OFFICIAL, OWN, TINY = "official", "its own autoencoder", "a tiny autoencoder"
FEW, WHOLE = "the paper's setting, few steps", "the paper's setting"
# Of one base: all but the paper's setting; that from a few steps; and with all of them.
BASE_SECONDS, FEW_SECONDS, WHOLE_SECONDS = 150.0, 60.0, 90.0
# The published tiny autoencoders: channels at each level, from pixels to latents.
TINY_ENCODER, TINY_DECODER, TINY_TIME = (64, 64, 64, 64), (64, 64, 128, 256), (2, 2, 1)

Way = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The paper's setting, and the two numbers of steps from which all of them are told."""

    frames: int = 49
    steps: int = 50
    few: tuple[int, int] = (2, 4)


REHEARSED = Paper(frames=9, steps=4, few=(2, 3))


@dataclass
class Scene:
    """One base with a picture to answer; predictors by frames and name, and why some are not.

    Shapes: prompt [1, L, D], embedded.
    """

    subject: Subject
    stage: Stage
    base: Any
    prompt: Tensor
    official: Official
    folder: Path
    predictors: dict[tuple[int, str], Predictor] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The picture's file."""
        return self.folder / "picture.png"

    def record(self, part: str, **fields: Any) -> Record:
        """Make a record of one part: the autoencoder, or the paper's setting."""
        settings = {
            "part": part,
            "size": list(self.subject.size),
            "layers": self.subject.card.layers,
            "failed": dict(self.failed),
            "skipped": dict(self.skipped),
        }
        return self.stage.record(
            kind=KIND, case=self.subject.card.name, images=1, settings=settings, **fields
        )


def units(stage: Stage, subjects: Sequence[Subject]) -> list[Unit]:
    """List the bases.

    Raises: EngineError if diffusers is not there.
    """
    return list_bases("answer", KIND, subjects, stage, seconds=BASE_SECONDS, measure=measure)


def measure(subject: Subject, stage: Stage) -> Iterator[Record]:
    """Answer one picture with one base: a record for each part."""
    with TemporaryDirectory() as folder:
        base = open_random(subject, stage)
        # Random, not zeros: products of zeros run faster than those of anything else.
        prompt = torch.randn(1, *subject.card.prompt, device=stage.device)
        scene = Scene(
            subject=subject,
            stage=stage,
            base=base,
            prompt=prompt,
            official=Official(subject.card, base, subject.size, prompt),
            folder=Path(folder),
        )
        noise = np.random.default_rng(0).integers(0, 256, (*subject.size, 3), dtype=np.uint8)
        write_image(scene.source, noise)
        for frames in sorted(base.geometry.frames, reverse=True):
            add_predictors(scene, frames)
        yield from _time(scene, OWN, _ours(scene) | _official(scene))
        paper = REHEARSED if stage.is_rehearsal else Paper()
        if stage.has(0.0 if stage.is_rehearsal else FEW_SECONDS):
            yield time_few(scene, paper)
        if base.tiny_file is not None:
            use_random_tiny(base, scene.folder, stage)
            yield from _time(scene, TINY, _ours(scene))
        if stage.has(0.0 if stage.is_rehearsal else WHOLE_SECONDS):
            yield time_whole(scene, paper)


def add_predictors(scene: Scene, frames: int) -> None:
    """Make a predictor that runs eagerly, and one whose denoiser is compiled, if it can be."""
    subject, stage = replace(scene.subject, frames=frames), scene.stage
    denoising = Denoising(scene.base, subject, stage, batch=1)
    recipe = Recipe(
        task="noise",
        codec=Codec("rgb"),
        metrics=(),
        size=subject.size,
        latent_shape=denoising.latent_shape,
        schedule=scene.base.schedule.at(int(np.prod(denoising.latent_shape[1:]))),
        noise="seeded",
        batch=1,
    )
    prompt = {"prompt": scene.prompt}
    eager = base_predictor(scene.base, recipe, prompt, origin=subject.card.name)
    scene.predictors[frames, EAGER] = eager
    name = f"{stage.engine} {GRAPH}"
    if not stage.has(0.0 if stage.is_rehearsal else VARIANT_SECONDS):
        scene.skipped[f"{frames} frames, {name}"] = TOO_LATE
        return
    compiled, reason = attempt(lambda: _compile(denoising, stage))
    if compiled is None:
        scene.failed[f"{frames} frames, {name}"] = reason
        return
    scene.predictors[frames, name] = Predictor(
        {**eager.runners, "denoiser": compiled},
        prompt=eager.prompt,
        recipe=recipe,
        origin=subject.card.name,
    )


def time_few(scene: Scene, paper: Paper) -> Record:
    """Time the paper's setting with few steps; tell from them how long all take, and say so."""
    guidance = GUIDANCE[scene.subject.card.family]
    ways = {
        _official_name(paper.frames, steps, guidance): partial(
            _answer_officially, scene, Setting(frames=paper.frames, steps=steps, guidance=guidance)
        )
        for steps in paper.few
    }
    with scene.stage.alone():
        next(iter(ways.values()))()  # the first call chooses kernels
        summaries = time_in_turns(ways, rounds=2, device="cpu", warmup=0)
    fewer, more = (summary.median_ms for summary in summaries.values())
    step_ms = (more - fewer) / (paper.few[1] - paper.few[0])
    whole_ms = fewer + step_ms * (paper.steps - paper.few[0])
    told = f", from {paper.few[0]} and {paper.few[1]} measured"
    variants = {name: summary.to_dict() for name, summary in summaries.items()}
    variants[_official_name(paper.frames, paper.steps, guidance) + told] = {
        "extrapolated_ms": whole_ms
    }
    return scene.record(FEW, reference=next(iter(ways)), variants=variants)


def time_whole(scene: Scene, paper: Paper) -> Record:
    """Time the paper's setting as it is, once."""
    guidance = GUIDANCE[scene.subject.card.family]
    setting = Setting(frames=paper.frames, steps=paper.steps, guidance=guidance)
    name = _official_name(paper.frames, paper.steps, guidance)
    ways = {name: partial(_answer_officially, scene, setting)}
    with scene.stage.alone():
        summaries = time_in_turns(ways, rounds=1, device="cpu", warmup=0)
    variants = {name: summaries[name].to_dict()}
    return scene.record(WHOLE, reference=name, variants=variants)


def use_random_tiny(base: Any, folder: Path, stage: Stage) -> None:
    """Let a base decode with a tiny autoencoder of the published sizes and random weights."""
    geometry, file = base.geometry, base.tiny_file
    config = AutoencoderConfig(
        latent_channels=geometry.channels,
        patch=geometry.space_factor // int(np.prod(SPACE)),
        space=SPACE,
        time=TINY_TIME,
        widths=TINY_ENCODER,
        blocks=BLOCKS,
        has_shortcut=False,
    )
    tiny = Taehv(
        config,
        decoder_widths=TINY_DECODER,
        has_encoder=file.encodes,
        keeps_even=file.keeps_even,
    )
    path = folder / f"{file.name}.safetensors"
    save_file(tiny.state_dict(), path)
    base.use_tiny(path)
    for network in base.networks().values():
        network.to(stage.device)


def _compile(denoising: Denoising, stage: Stage) -> Any:
    """Compile a denoiser. Raises: EngineError if it errs more than bf16 allows."""
    inputs = denoising.inputs(slice(0, 1))
    with stage.alone():
        truths = {0: denoising.exact(inputs)}
    runner, _ = denoising.build(Variant(engine=stage.engine))
    with stage.alone(), torch.inference_mode():
        eager = judge(lambda: denoising.eager(inputs), truths)
        reason = refusal(GRAPH, judge(recorded(runner, inputs, stage), truths), eager)
    if reason:
        raise EngineError(reason)
    return runner


def _ours(scene: Scene) -> dict[str, Way]:
    return {
        f"{_length(frames, steps)}, {name}": partial(
            _answer, scene, predictor.with_recipe(steps=steps)
        )
        for (frames, name), predictor in scene.predictors.items()
        for steps in STEPS
    }


def _official(scene: Scene) -> dict[str, Way]:
    """Give the official pipeline with as many frames and steps as ours."""
    return {
        _official_name(frames, steps, 1.0): partial(
            _answer_officially, scene, Setting(frames=frames, steps=steps)
        )
        for frames in sorted(scene.base.geometry.frames, reverse=True)
        for steps in STEPS
        if steps >= LEAST_STEPS[scene.subject.card.family]
    }


def _official_name(frames: int, steps: int, guidance: float) -> str:
    guided = "" if guidance == 1 else f", guidance {guidance:g}"
    return f"{_length(frames, steps)}, {OFFICIAL}{guided}"


def _length(frames: int, steps: int) -> str:
    return f"{frames} frames, {steps} step{'s' * (steps != 1)}"


def _time(scene: Scene, part: str, ways: Mapping[str, Way]) -> Iterator[Record]:
    """Call each way once, then time those that work in turns; the CPU waits for each answer."""
    working = {}
    with scene.stage.alone():
        for name, way in ways.items():
            _, reason = attempt(way)
            if reason:
                scene.failed[name] = reason
            else:
                working[name] = way
        if not working:
            raise EngineError(f"no way to answer works: {scene.failed}")
        rounds = min(ROUNDS, scene.stage.rounds)
        summaries = time_in_turns(working, rounds=rounds, device="cpu")
    variants = {name: summary.to_dict() for name, summary in summaries.items()}
    yield scene.record(part, reference=next(iter(working)), variants=variants)


def _answer(scene: Scene, predictor: Predictor) -> None:
    pixels = read_image(scene.source)
    values = to_model(pixels, scene.subject.size)[None]
    answer = from_model(predictor.answer(values)[0], pixels.shape[:2])
    write_image(scene.folder / "answer.png", to_uint8(answer))


def _answer_officially(scene: Scene, setting: Setting) -> None:
    scene.official.answer(scene.source, scene.folder / "official.png", setting)

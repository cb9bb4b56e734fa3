"""Frames between the first and the last, dropped after the first steps.

References: diffusers' ChronoEdit pipeline with its "temporal reasoning", and walks by hand.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import cogvideox, ltx, relative, wan
from torch import Tensor, nn

from fewshot_rt.bases import open_base
from fewshot_rt.errors import ConfigError, ModelError
from fewshot_rt.fit import fit, probe
from fewshot_rt.runs import base_predictor, open_run
from fewshot_rt.sample import keep_ends, sample
from fewshot_rt.schedule import Schedule
from fewshot_rt.task import Task
from fewshot_rt.train_config import TrainConfig
from fewshot_rt.transition import Transition

STEPS, DROP = 4, 2


def test_ends_are_kept_in_numpy_and_torch() -> None:
    latents = np.arange(2 * 6, dtype=np.float32).reshape(1, 2, 6, 1, 1)
    for count, kept in ((1, [0, 5]), (2, [0, 1, 4, 5])):
        np.testing.assert_array_equal(keep_ends(latents, count), latents[:, :, kept])
        np.testing.assert_array_equal(
            keep_ends(torch.from_numpy(latents), count).numpy(), latents[:, :, kept]
        )


@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_a_walk_whose_frames_do_not_meet_ends_where_it_would(solver: str) -> None:
    """Where each frame goes by itself, dropping others changes nothing for it."""
    noise = np.random.default_rng(0).normal(size=(1, 2, 5, 3, 3))
    seen = []

    def denoise(noisy: Any, time: Any) -> Any:
        seen.append(noisy.shape[2])
        return np.sin(3 * noisy) + time[0]

    options: dict[str, Any] = {"schedule": Schedule(), "steps": 6, "solver": solver}
    *_, whole = sample(denoise, noise, **options)
    *_, short = sample(denoise, noise, **options, drop_after=2)
    np.testing.assert_allclose(short.latents, keep_ends(whole.latents, 1), rtol=1e-12)
    assert seen == [5] * 6 + [5, 5, 2, 2, 2, 2]


def open_chronoedit(folder: Path, transformer: Any) -> Any:
    """The official pipeline of a Wan folder's parts, its solver of the first order, as ours."""
    from diffusers import (
        ChronoEditPipeline,
        ChronoEditTransformer3DModel,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
    )

    edit = ChronoEditTransformer3DModel(
        **{k: v for k, v in transformer.config.items() if not k.startswith("_")}
    )
    edit.load_state_dict(transformer.state_dict())
    plain: Any = WanImageToVideoPipeline.from_pretrained(folder)
    parts = {
        name: getattr(plain, name)
        for name in ("tokenizer", "text_encoder", "image_encoder", "image_processor", "vae")
    }
    scheduler = UniPCMultistepScheduler.from_config(
        plain.scheduler.config, solver_order=1, disable_corrector=list(range(50))
    )
    official: Any = ChronoEditPipeline(transformer=edit, scheduler=scheduler, **parts)
    official.set_progress_bar_config(disable=True)
    return official


@torch.no_grad()
def test_the_answer_is_that_of_chronoedit(tmp_path: Path, make_text_encoder: Any) -> None:
    folder = wan.write(tmp_path / "wan", "2.1", make_text_encoder(is_multilingual=True))
    base: Any = open_base(str(folder))
    for name, parameter in base.denoiser().named_parameters():
        if "norm_q" in name or "norm_k" in name:  # so that attention tells places apart
            nn.init.constant_(parameter, 3.0)
    transformer = base.denoiser().transformer
    official = open_chronoedit(folder, transformer)
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (1, 3, 224, 224), generator=generator) / 127.5 - 1
    pixels = ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    shape = base.geometry.latent_shape(frames=29, height=224, width=224)
    noise = torch.randn(1, *shape, generator=generator)
    prompt = base.embed("a mask")["prompt"]
    expected = official(
        image=picture,
        height=224,
        width=224,
        num_frames=29,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=noise,
        prompt_embeds=prompt,
        negative_prompt_embeds=prompt,
        enable_temporal_reasoning=True,
        num_temporal_reasoning_steps=DROP,
        output_type="latent",
    ).frames
    base.play(Transition(kind="repeat_target", frames=29, span=29))
    conditions = base.condition(image, frames=shape[1])

    def denoise(noisy: Tensor, time: Tensor) -> Tensor:
        known = conditions["known"]
        known = known if noisy.shape[2] == shape[1] else keep_ends(known, 1)
        found: Tensor = base.denoiser()(noisy, time, prompt, **conditions | {"known": known})
        return found

    *_, last = sample(denoise, noise, schedule=base.schedule, steps=STEPS, drop_after=DROP)
    assert last.latents.shape == expected.shape
    assert relative(last.latents, expected) < 1e-4
    *_, kept = sample(denoise, noise, schedule=base.schedule, steps=STEPS)
    assert relative(keep_ends(kept.latents, 1), expected) > 1e-3


FAMILIES = {
    "wan": (wan, "2.2-A14B", 9, "32x32"),
    "clean": (wan, "2.2-5B", 9, "32x32"),
    "ltx": (ltx, "0.9.5", 17, "32x32"),
    "cogvideox": (cogvideox, "1.5", 17, "48x32"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_drop_frames(
    family: str, tmp_path: Path, make_text_encoder: Any, write_noise_pairs: Any
) -> None:
    """The answer is another one than with all frames."""
    maker, version, frames, size = FAMILIES[family]
    text = make_text_encoder(is_multilingual=True) if maker is wan else make_text_encoder()
    folder = maker.write(tmp_path / family, version, text)
    width, height = map(int, size.split("x"))
    settings = f'transition = {{kind = "repeat_target", frames = {frames}}}'
    write_noise_pairs(tmp_path / "pairs", (height, width), settings=settings)
    run = tmp_path / "runs" / "one"
    config = TrainConfig(
        base=str(folder), hold_out=0, size=size, steps=1, batch=1, rank=2, objective="diffusion"
    )
    *_, _ = fit(tmp_path / "pairs", run, config)
    plain = open_run(run).with_recipe(steps=STEPS, noise="seeded")
    dropped = open_run(run, drops=True).with_recipe(steps=STEPS, noise="seeded")
    image = probe(plain)
    # Ready to drop frames, it answers the same until it does.
    np.testing.assert_array_equal(dropped.answer(image), plain.answer(image))
    found = dropped.with_recipe(drop_after=DROP).answer(image)
    assert np.abs(found - plain.answer(image)).max() > 1e-6
    with pytest.raises(ConfigError, match="after 4 of 4 steps"):
        dropped.with_recipe(drop_after=4)


def test_where_nothing_can_be_dropped_it_is_said(exported: Any, tiny_base: Any) -> None:
    task = Task.load(Path("pairs"))
    recipe = replace(open_run(Path("runs/one")).recipe, steps=4)
    predictor = base_predictor(tiny_base, recipe, tiny_base.embed(task.prompt), origin="tiny")
    with pytest.raises(ConfigError, match="all are ends"):
        predictor.with_recipe(drop_after=1)
    images = Path("pairs/test/input")
    status, _, err = exported("predict", images, "--model", "one", "--drop-after", 1)
    assert (status, "leave out --drop-after" in err) == (1, True)
    bundle = "runs/one/bundles/onnx-fp32"
    status, _, err = exported("predict", images, "--model", bundle, "--drop-after", 1)
    assert (status, "is a bundle" in err) == (2, True)
    with pytest.raises(ModelError, match="leave out --drop-after"):
        tiny_base.play(Transition(frames=9, span=9))

"""CogVideoX against diffusers' own pipeline, on tiny checkpoints with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import draw_image, relative
from tiny.cogvideox import VERSIONS, write
from torch import Tensor

from fewshot_rt.adapter import add_lora
from fewshot_rt.bases import open_base
from fewshot_rt.bases.cogvideox import PIPELINES, CogVideoXBase
from fewshot_rt.errors import ModelError
from fewshot_rt.fit import fit
from fewshot_rt.runs import open_run
from fewshot_rt.sample import sample
from fewshot_rt.train_config import TrainConfig

SIZES = ((16, 16), (32, 48))


@pytest.fixture(scope="module", params=VERSIONS)
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_text_encoder: Any,
) -> Path:
    place = tmp_path_factory.mktemp("cogvideox") / request.param
    return write(place, request.param, make_text_encoder())


@pytest.fixture(scope="module")
def official(folder: Path) -> Any:
    from diffusers import CogVideoXImageToVideoPipeline

    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def base(folder: Path) -> CogVideoXBase:
    opened = open_base(str(folder))
    assert isinstance(opened, CogVideoXBase)
    return opened


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("guidance", "is_dynamic"), [(1.0, False), (6.0, False), (6.0, True)])
def test_the_sampler_gives_the_video_of_the_official_pipeline(
    base: CogVideoXBase,
    official: Any,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    frames: int,
    steps: int,
    guidance: float,
    is_dynamic: bool,
) -> None:
    # The pipeline draws the first frame from the autoencoder's distribution; ours takes its mean.
    distribution = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{distribution}.sample", lambda self, generator=None: self.mode())
    height, width = size
    shape = base.geometry.latent_shape(frames=frames, height=height, width=width)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    image = draw_image(size)
    prompts = {
        name: base.embed(text)["prompt"] for name, text in (("with", "a mask"), ("without", ""))
    }
    expected = official(
        image=image / 2 + 0.5,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        use_dynamic_cfg=is_dynamic,
        latents=noise.transpose(1, 2),
        prompt_embeds=prompts["with"],
        negative_prompt_embeds=prompts["without"],
        max_sequence_length=8,
        output_type="pt",
    ).frames
    first = base.condition(image, frames=2)

    def denoise(noisy: Tensor, time: Tensor) -> Tensor:
        named = base.denoiser()(noisy, time, **first, prompt=prompts["with"])
        if guidance == 1:
            return named
        silent = base.denoiser()(noisy, time, **first, prompt=prompts["without"])
        scale = guidance
        if is_dynamic:  # the pipeline's formula, of the step's number in 0 ... 999
            step = round(float(time[0]) * 1000) - 1
            scale = 1 + guidance * (1 - np.cos(np.pi * ((steps - step) / steps) ** 5)) / 2
        return silent + scale * (named - silent)

    *_, last = sample(denoise, noise, schedule=base.schedule, steps=steps)
    video = (base.decode(last.latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    # An even number of latent frames is decoded to four frames each, the first one, too.
    decoded = 8 if frames == 5 else frames
    assert video.shape == expected.shape == (1, decoded, 3, *size)
    for frame in range(decoded):
        assert relative(video[:, frame], expected[:, frame]) < 1e-4
    torch.testing.assert_close(base.decode_last(last.latents), base.decode(last.latents)[:, :, -1])


def test_prompts_are_embedded_as_the_official_pipeline_does(
    base: CogVideoXBase, official: Any
) -> None:
    expected, _ = official.encode_prompt(
        "a mask", do_classifier_free_guidance=False, max_sequence_length=8
    )
    torch.testing.assert_close(base.embed("a mask")["prompt"], expected)


@torch.no_grad()
def test_the_loss_is_that_of_the_reference_trainer(base: CogVideoXBase, official: Any) -> None:
    """Against diffusers' image-to-video LoRA script: v-prediction, weighted by 1 / (1 - alpha).

    Its weighted error of the clean latents equals the error of the prediction itself.
    """
    generator = torch.Generator().manual_seed(3)
    shape = base.geometry.latent_shape(frames=9, height=16, width=16)
    clean, noise = (torch.randn(2, *shape, generator=generator) for _ in range(2))
    steps = torch.tensor([250, 731])
    first, prompt = (
        base.condition(draw_image((16, 16)).expand(2, -1, -1, -1), frames=4),
        base.embed(""),
    )
    time = (steps + 1) / 1000
    noisy = base.schedule.noise(clean, noise, time)
    prediction = base.denoiser()(noisy, time, **first, **prompt)
    ours = (prediction - base.schedule.target(clean, noise, time)).square().mean(dim=(1, 2, 3, 4))

    scheduler = official.scheduler
    theirs_noisy = scheduler.add_noise(clean, noise, steps)
    torch.testing.assert_close(noisy, theirs_noisy, rtol=1e-5, atol=1e-5)
    found = scheduler.get_velocity(prediction, theirs_noisy, steps)
    weights = 1 / (1 - scheduler.alphas_cumprod[steps].float())
    theirs = weights * (found - clean).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_latents_of_a_video_are_scaled_and_merged(base: CogVideoXBase, official: Any) -> None:
    video = torch.rand(2, 3, 9, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    expected = torch.cat([official.vae.encode(one[None]).latent_dist.mode() for one in video])
    latents = base.encode(video)
    extra = base.geometry.merged_frames - 1
    torch.testing.assert_close(latents[:, :, extra:], expected * 0.7)
    if extra:
        torch.testing.assert_close(latents[:, :, 0], latents[:, :, 1])
    assert base.encode(video[:, :, :5]).shape[2] == 2


@torch.no_grad()
def test_large_videos_go_through_the_autoencoder_in_the_official_tiles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKLCogVideoX

    monkeypatch.setattr("fewshot_rt.bases.cogvideox.TILE", (48, 40))
    base: Any = open_base(str(folder))
    official = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")
    video = torch.rand(2, 3, 9, 80, 64, generator=torch.Generator().manual_seed(8)) * 2 - 1
    latents = base.encode(video)
    whole = official.encode(video).latent_dist.mode() * 0.7
    official.enable_tiling(48, 40)
    tiled = torch.cat([official.encode(one[None]).latent_dist.mode() for one in video]) * 0.7
    last = tiled.shape[2]  # without what was put in front
    torch.testing.assert_close(latents[:, :, -last:], tiled)
    assert relative(whole, tiled) > 1e-3
    expected = torch.cat([official.decode(one[None] / 0.7).sample for one in tiled])
    torch.testing.assert_close(base.decode(base.encode(video)), expected)


@torch.no_grad()
def test_an_adapter_of_no_steps_changes_no_bit(folder: Path) -> None:
    base = open_base(str(folder))
    shape = base.geometry.latent_shape(frames=9, height=16, width=16)
    noisy = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5))
    inputs = base.condition(draw_image((16, 16)), frames=4) | base.embed("a mask")
    before = base.denoiser()(noisy, torch.ones(1), **inputs)
    assert len(add_lora(base, rank=4, alpha=4, seed=0)) == 2 * 4 * 2  # layers, matrices, A and B
    assert torch.equal(base.denoiser()(noisy, torch.ones(1), **inputs), before)


@pytest.mark.slow
def test_a_trained_adapter_gives_the_same_video_in_diffusers(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_noise_pairs: Any,
    freeze: Any,
) -> None:
    """From pairs to a run, to a bundle, and to the official pipeline with `load_lora_weights`."""
    from diffusers import CogVideoXImageToVideoPipeline

    distribution = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{distribution}.sample", lambda self, generator=None: self.mode())
    run = tmp_path / "runs" / "one"
    write_noise_pairs(tmp_path / "pairs", (32, 48))
    options: dict[str, Any] = {
        "steps": 4,
        "batch": 1,
        "rank": 4,
        "rate": 0.005,
        "precision": "fp32",
    }
    config = TrainConfig(base=str(folder), hold_out=0, objective="diffusion", **options)
    *_, last = fit(tmp_path / "pairs", run, config)
    assert last.step == 4

    predictor = open_run(run)
    image = draw_image((32, 48))
    answer = torch.from_numpy(predictor.answer(image.numpy()))
    frozen = freeze(run, tmp_path / "bundle").answer(image.numpy())
    torch.testing.assert_close(torch.from_numpy(frozen), answer, rtol=1e-3, atol=1e-3)

    official = CogVideoXImageToVideoPipeline.from_pretrained(folder)
    official.set_progress_bar_config(disable=True)
    official.load_lora_weights(run)
    call: dict[str, Any] = {
        "image": image / 2 + 0.5,
        "prompt": "a mask",
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": predictor.recipe.steps,
        "guidance_scale": 1.0,
        "latents": torch.from_numpy(predictor._noise[:1]).transpose(1, 2),
        "max_sequence_length": 8,
        "output_type": "pt",
    }
    video = official(**call).frames[:, -1]
    assert relative((answer / 2 + 0.5).clamp(0, 1), video) < 1e-4
    official.unload_lora_weights()
    assert relative(official(**call).frames[:, -1], video) > 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [("timestep_spacing", "leading"), ("rescale_betas_zero_snr", False)],
)
def test_a_scheduler_that_does_not_begin_at_pure_noise_is_refused(
    tmp_path: Path, make_text_encoder: Any, key: str, value: Any
) -> None:
    folder = write(tmp_path / "tiny", "1.0", make_text_encoder())
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=key):
        open_base(str(folder))


@pytest.mark.parametrize("damage", ["shard", "missing", "index", "pipeline"])
def test_a_damaged_folder_is_refused(tmp_path: Path, make_text_encoder: Any, damage: str) -> None:
    folder = write(tmp_path / "tiny", "1.0", make_text_encoder())
    shard = min((folder / "transformer").glob("*.safetensors"))
    index = folder / "model_index.json"
    if damage == "shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    elif damage == "index":
        index.write_text("{")
    else:
        index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    expected = PIPELINES[0] if damage == "pipeline" else "cannot be read"
    with pytest.raises(ModelError, match=expected):
        open_base(str(folder))

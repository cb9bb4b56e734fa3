"""Wan against diffusers' own pipeline, on tiny checkpoints with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import relative
from tiny.wan import AUTOENCODER, VERSIONS, write
from torch import Tensor

from fewshot_rt.adapter import EXPERT_FILES, add_lora
from fewshot_rt.bases import open_base
from fewshot_rt.bases.wan import WanBase
from fewshot_rt.errors import ModelError
from fewshot_rt.fit import fit
from fewshot_rt.objectives import diffusion_loss
from fewshot_rt.runs import open_run
from fewshot_rt.sample import sample
from fewshot_rt.train_config import TrainConfig

# CLIP takes images 224 high as they are; others are resized, see below.
SIZES = {
    "2.1": ((224, 224), (224, 256)),
    "2.2-5B": ((32, 32), (32, 64)),
    "2.2-A14B": ((16, 16), (32, 64)),
}


@pytest.fixture(scope="module", params=VERSIONS)
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_text_encoder: Any,
) -> Path:
    place = tmp_path_factory.mktemp("wan") / request.param
    return write(place, request.param, make_text_encoder(is_multilingual=True))


def open_official(folder: Path) -> Any:
    """The official pipeline, its solver of the first order, which is ours, and uncorrected."""
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, solver_order=1, disable_corrector=list(range(50))
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def official(folder: Path) -> Any:
    return open_official(folder)


@pytest.fixture(scope="module")
def base(folder: Path) -> WanBase:
    opened = open_base(str(folder))
    assert isinstance(opened, WanBase)
    return opened


def image_of(size: tuple[int, int]) -> Tensor:
    """An image of whole grey levels, so that it goes through a file unchanged."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (1, 3, *size), generator=generator) / 127.5 - 1


def picture_of(image: Tensor) -> Any:
    from PIL import Image

    pixels = ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


@torch.no_grad()
@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_sampler_gives_the_video_of_the_official_pipeline(
    base: WanBase,
    official: Any,
    folder: Path,
    choice: int,
    frames: int,
    steps: int,
    guidance: float,
) -> None:
    size = height, width = SIZES[folder.name][choice]
    shape = base.geometry.latent_shape(frames=frames, height=height, width=width)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    image = image_of(size)
    prompts = {
        name: base.embed(text)["prompt"] for name, text in (("with", "a mask"), ("without", ""))
    }
    call: dict[str, Any] = {
        "image": picture_of(image),
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "latents": noise,
        "prompt_embeds": prompts["with"],
        "negative_prompt_embeds": prompts["without"],
        "output_type": "pt",
    }
    expected = official(**call).frames
    conditions = base.condition(image, frames=shape[1])

    def denoise(noisy: Tensor, time: Tensor) -> Tensor:
        named = base.denoiser()(noisy, time, **conditions, prompt=prompts["with"])
        if guidance == 1:
            return named
        silent = base.denoiser()(noisy, time, **conditions, prompt=prompts["without"])
        return silent + guidance * (named - silent)

    *_, last = sample(denoise, noise, schedule=base.schedule, steps=steps)
    video = (base.decode(last.latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    assert video.shape == expected.shape == (1, frames, 3, *size)
    for frame in range(frames):
        assert relative(video[:, frame], expected[:, frame]) < 1e-4
    torch.testing.assert_close(base.decode_last(last.latents), base.decode(last.latents)[:, :, -1])


def test_prompts_are_embedded_as_the_official_pipeline_does(base: WanBase, official: Any) -> None:
    expected, _ = official.encode_prompt(
        "a  mask", do_classifier_free_guidance=False, max_sequence_length=512
    )
    torch.testing.assert_close(base.embed("a  mask")["prompt"], expected)
    assert base.embed("a mask")["prompt"][:, 2:].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (250, 333), (448, 231)])
def test_images_reach_clip_as_its_own_processor_has_them(
    base: WanBase, official: Any, size: tuple[int, int]
) -> None:
    if base.image_encoder is None:
        assert official.image_processor is None
        return
    image = ((image_of(size) * 63).round() + 0.5) / 127.5  # the processor clips what overshoots
    expected = official.image_processor(picture_of(image), return_tensors="pt").pixel_values
    found = base.image_encoder.prepare(image)
    # The processor rounds to whole grey levels along each side; one level is 1 / 255 / 0.26.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if size == (224, 224) else 0.02)


@torch.no_grad()
def test_latents_of_a_video_are_normalised(base: WanBase, official: Any) -> None:
    video = torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    expected = torch.cat([official.vae.encode(one[None]).latent_dist.mode() for one in video])
    mean, std = (
        torch.tensor(AUTOENCODER[f"latents_{n}"])[:, None, None, None] for n in ("mean", "std")
    )
    torch.testing.assert_close(base.encode(video), (expected - mean) / std)


@torch.no_grad()
def test_the_loss_is_flow_matching(base: WanBase, official: Any) -> None:
    """Against the formula, written out with the official transformer (Lipman et al. 2023)."""
    generator = torch.Generator().manual_seed(3)
    size = (64, 64)
    shape = base.geometry.latent_shape(frames=9, height=size[0], width=size[1])
    clean = torch.randn(2, *shape, generator=generator)
    image = image_of(size).expand(2, -1, -1, -1)
    conditions, prompt = base.condition(image, frames=shape[1]), base.embed("")
    official_calls = []

    def predict(noisy: Tensor, moment: Tensor) -> Tensor:
        whole = ((moment * 1000).floor() + 0.5) / 1000  # the same step, far from the next
        official_calls.append((noisy, whole))
        return base.denoiser()(noisy, whole, **conditions, **prompt)

    known = base.geometry.known_frames
    ours = diffusion_loss(base.schedule, predict, clean, torch.Generator().manual_seed(9), known)
    ((noisy, whole),) = official_calls

    draws = torch.Generator().manual_seed(9)
    time = torch.sigmoid(torch.randn(2, generator=draws))[:, None, None, None, None]
    noise = torch.randn(clean.shape, generator=draws)
    mixed = (1 - time) * clean + time * noise
    torch.testing.assert_close(noisy, mixed, rtol=1e-5, atol=1e-5)
    steps = (whole * 1000).floor()
    theirs = []
    for index, step in enumerate(steps):
        if "first" in conditions:
            seen = torch.cat([conditions["first"][index, :, :1], mixed[index, :, 1:]], dim=1)
            tokens = torch.ones(shape[1], shape[2] // 2, shape[3] // 2)
            tokens[0] = 0
            timestep = (tokens * step).flatten()
        else:
            seen = torch.cat([mixed[index], conditions["known"][index]])
            timestep = step
        is_first = official.config.boundary_ratio is None or step >= 900
        expert = official.transformer if is_first else official.transformer_2
        found = expert(
            hidden_states=seen[None],
            timestep=timestep[None],
            encoder_hidden_states=prompt["prompt"],
            encoder_hidden_states_image=conditions["image_tokens"][:1]
            if "image_tokens" in conditions
            else None,
            return_dict=False,
        )[0]
        error = found[0] - (noise - clean)[index]
        theirs.append(error[:, known:].square().mean())
    torch.testing.assert_close(ours, torch.stack(theirs).mean(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_expert_answers_for_its_own_times(tmp_path: Path, make_text_encoder: Any) -> None:
    text = make_text_encoder(is_multilingual=True)
    base = open_base(str(write(tmp_path / "two", "2.2-A14B", text)))
    generator = torch.Generator().manual_seed(6)
    noisy = torch.randn(3, 4, 2, 4, 4, generator=generator)
    inputs = base.condition(image_of((32, 32)), frames=2) | base.embed("a mask")
    inputs["known"] = inputs["known"].expand(3, -1, -1, -1, -1)
    times = torch.tensor([1.0, 0.9, 0.8994])
    together = base.denoiser()(noisy, times, **inputs)
    captured = torch.export.export(
        base.denoiser(), (noisy, times), {k: v.contiguous() for k, v in inputs.items()}
    )
    torch.testing.assert_close(captured.module()(noisy, times, **inputs), together)
    experts = base.denoiser().transformer
    steps = torch.tensor([999.0, 900.0, 899.0])
    for index, expert in enumerate(
        (experts.transformer, experts.transformer, experts.transformer_2)
    ):
        expected = expert(
            torch.cat([noisy, inputs["known"]], dim=1)[index : index + 1],
            steps[index : index + 1],
            inputs["prompt"],
            return_dict=False,
        )[0]
        torch.testing.assert_close(together[index : index + 1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_adapter_of_no_steps_changes_no_bit(folder: Path) -> None:
    base = open_base(str(folder))
    shape = base.geometry.latent_shape(frames=5, height=32, width=32)
    noisy = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5))
    inputs = base.condition(image_of((32, 32)), frames=2) | base.embed("a mask")
    for time in (torch.ones(1), torch.full((1,), 0.5)):
        before = base.denoiser()(noisy, time, **inputs)
        base_with = open_base(str(folder))
        assert add_lora(base_with, rank=4, alpha=4, seed=0)
        assert torch.equal(base_with.denoiser()(noisy, time, **inputs), before)


@pytest.mark.slow
def test_a_trained_adapter_gives_the_same_video_in_diffusers(
    folder: Path, tmp_path: Path, write_noise_pairs: Any, freeze: Any
) -> None:
    """From pairs to a run, to a bundle, and to the official pipeline with `load_lora_weights`."""
    run = tmp_path / "runs" / "one"
    settings = 'transition = { kind = "repeat_target", frames = 5 }\n'
    write_noise_pairs(tmp_path / "pairs", (32, 64), settings=settings)
    options: dict[str, Any] = {"steps": 4, "rank": 4, "rate": 0.02, "clip": 1.0}
    config = TrainConfig(
        base=str(folder),
        hold_out=0,
        objective="diffusion",
        size="64x32",
        precision="fp32",
        **options,
    )
    *_, last = fit(tmp_path / "pairs", run, config)
    assert last.step == 4

    predictor = open_run(run)
    image = image_of((32, 64))
    answer = torch.from_numpy(predictor.answer(image.numpy()))
    frozen = freeze(run, tmp_path / "bundle").answer(image.numpy())
    torch.testing.assert_close(torch.from_numpy(frozen), answer, rtol=1e-3, atol=1e-3)

    official = open_official(folder)
    official.load_lora_weights(run)
    second = run / EXPERT_FILES["transformer_2."]
    assert second.is_file() == (official.transformer_2 is not None)
    if second.is_file():
        official.load_lora_weights(
            run, weight_name=second.name, adapter_name="second", load_into_transformer_2=True
        )
    call: dict[str, Any] = {
        "image": picture_of(image),
        "prompt": "a mask",
        "height": 32,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": predictor.recipe.steps,
        "guidance_scale": 1.0,
        "latents": torch.from_numpy(predictor._noise[:1]),
        "output_type": "pt",
    }
    video = official(**call).frames[:, -1]
    # CLIP's own processor rounds the image that it has resized; see above.
    tolerance = 1e-3 if official.image_encoder else 1e-4
    assert relative((answer / 2 + 0.5).clamp(0, 1), video) < tolerance
    official.unload_lora_weights()
    assert relative(official(**call).frames[:, -1], video) > 5e-3


def test_a_pipeline_for_text_alone_is_refused(tmp_path: Path, make_text_encoder: Any) -> None:
    text = make_text_encoder(is_multilingual=True)
    folder = write(tmp_path / "tiny", "2.2-5B", text)
    index = folder / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps(values | {"_class_name": "WanPipeline"}))
    assert open_base(str(folder)).geometry.known_frames == 1
    index.write_text(json.dumps(values | {"expand_timesteps": False}))
    with pytest.raises(ModelError, match="text alone"):
        open_base(str(folder))


@pytest.mark.parametrize("damage", ["scheduler", "shard", "expert"])
def test_a_damaged_folder_is_refused(tmp_path: Path, make_text_encoder: Any, damage: str) -> None:
    text = make_text_encoder(is_multilingual=True)
    folder = write(tmp_path / "tiny", "2.2-A14B", text)
    if damage == "scheduler":
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_flow_sigmas": False}))
    else:
        part = {"shard": "transformer", "expert": "transformer_2"}[damage]
        min((folder / part).glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        open_base(str(folder))

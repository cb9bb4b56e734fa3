"""LTX-Video against diffusers' own pipelines, on tiny checkpoints with random weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import draw_image, relative
from tiny.ltx import VERSIONS, write
from torch import Tensor

from fewshot_rt.adapter import add_lora
from fewshot_rt.bases import open_base
from fewshot_rt.bases.ltx import PIPELINES, LTXBase
from fewshot_rt.errors import ModelError
from fewshot_rt.fit import fit
from fewshot_rt.objectives import diffusion_loss
from fewshot_rt.runs import open_run
from fewshot_rt.sample import sample
from fewshot_rt.train_config import TrainConfig

SIZES = ((32, 32), (64, 96))
# NumPy 2 minds how the scheduler of diffusers reads the times that the pipeline gives it.
READING = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
LENGTHS = {"0.9.0": 128, "0.9.5": 256}  # tokens of a prompt


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(version: str, tmp_path_factory: pytest.TempPathFactory, make_text_encoder: Any) -> Path:
    place = tmp_path_factory.mktemp("ltx") / version
    return write(place, version, make_text_encoder())


@pytest.fixture(scope="module")
def official(folder: Path, version: str) -> Any:
    import diffusers

    pipeline = getattr(diffusers, VERSIONS[version]["pipeline"]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def base(folder: Path) -> LTXBase:
    opened = open_base(str(folder))
    assert isinstance(opened, LTXBase)
    return opened


def begin_with(monkeypatch: pytest.MonkeyPatch, noise: Tensor) -> None:
    """Let the official pipelines begin with this noise and with the mean of the first frame."""
    distribution = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{distribution}.sample", lambda self, generator=None: self.mode())
    for module in ("image2video", "condition"):
        place = f"diffusers.pipelines.ltx.pipeline_ltx_{module}.randn_tensor"
        monkeypatch.setattr(place, lambda shape, **_: noise.clone().reshape(shape))


def call_of(version: str, image: Tensor, *, steps: int, frames: int) -> dict[str, Any]:
    """Give what both official pipelines are called with, and to leave the first frame clean."""
    height, width = image.shape[2:]
    call = {
        "image": image / 2 + 0.5,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "output_type": "pt",
    }
    return call | ({"image_cond_noise_scale": 0.0} if version == "0.9.5" else {})


@READING
@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frames", [9, 17])
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_sampler_gives_the_video_of_the_official_pipeline(
    base: LTXBase,
    official: Any,
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    frames: int,
    steps: int,
    guidance: float,
) -> None:
    height, width = size
    shape = base.geometry.latent_shape(frames=frames, height=height, width=width)
    schedule = base.schedule.at(math.prod(shape[1:]))
    if steps == 1:
        assert schedule.times(1) == (1, 0)
        # Stretching a single time to `shift_terminal`, the official scheduler divides 0 by 0.
        whole = type(official.scheduler).from_config(official.scheduler.config, shift_terminal=None)
        monkeypatch.setattr(official, "scheduler", whole)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    begin_with(monkeypatch, noise)
    image = draw_image(size)
    # T5's own tokenizer gives no prompt without a token: it ends all with a mark.
    named, other = base.embed("a mask"), base.embed("mask")
    expected = official(
        **call_of(version, image, steps=steps, frames=frames),
        guidance_scale=guidance,
        prompt="a mask",
        negative_prompt="mask",
    ).frames
    first = base.condition(image, frames=shape[1])

    def denoise(noisy: Tensor, time: Tensor) -> Tensor:
        with_prompt = base.denoiser()(noisy, time, **first, **named)
        without = base.denoiser()(noisy, time, **first, **other)
        return without + guidance * (with_prompt - without)

    *_, last = sample(denoise, noise, schedule=schedule, steps=steps)
    video = (base.decode(last.latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    assert video.shape == expected.shape == (1, frames, 3, *size)
    for frame in range(frames):
        assert relative(video[:, frame], expected[:, frame]) < 1e-4
    torch.testing.assert_close(base.decode_last(last.latents), base.decode(last.latents)[:, :, -1])


def test_prompts_are_embedded_as_the_official_pipeline_does(
    base: LTXBase, official: Any, version: str
) -> None:
    expected, mask, *_ = official.encode_prompt("a mask", do_classifier_free_guidance=False)
    assert expected.shape == (1, LENGTHS[version], 16)
    torch.testing.assert_close(base.embed("a mask")["prompt"], expected[:, mask[0]])


@torch.no_grad()
def test_the_loss_is_that_of_flow_matching(base: LTXBase, official: Any, version: str) -> None:
    """Written out over the transformer of diffusers: Lipman et al. 2023, eq. 20 and 23."""
    batch, (height, width) = 2, (64, 96)
    shape = base.geometry.latent_shape(frames=17, height=height, width=width)
    clean = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(3))
    inputs = base.embed("a mask") | {"first": clean[:, :, :1]}
    prompt, mask, *_ = official.encode_prompt("a mask", do_classifier_free_guidance=False)

    def predict(noisy: Tensor, time: Tensor) -> Tensor:
        prediction: Tensor = base.denoiser()(noisy, time, **inputs)
        return prediction

    generator = torch.Generator().manual_seed(4)
    ours = diffusion_loss(base.schedule, predict, clean, generator, base.geometry.known_frames)

    generator = torch.Generator().manual_seed(4)
    time = torch.sigmoid(torch.randn(batch, generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    t = time[:, None, None, None, None]
    noisy = torch.cat([clean[:, :, :1], ((1 - t) * clean + t * noise)[:, :, 1:]], dim=2)
    frames, rows, columns = shape[1:]
    timestep = (1000 * time)[:, None].repeat(1, frames * rows * columns)
    timestep[:, : rows * columns] = 0
    if version == "0.9.0":
        places: dict[str, Any] = {"rope_interpolation_scale": (8 / 25, 32, 32)}
        places |= {"num_frames": frames, "height": rows, "width": columns}
    else:
        ids = official._scale_video_ids(official._prepare_video_ids(batch, frames, rows, columns))
        places = {"video_coords": ids / torch.tensor([25, 1, 1])[:, None]}
    prediction = official.transformer(
        hidden_states=official._pack_latents(noisy),
        encoder_hidden_states=prompt.repeat(batch, 1, 1),
        encoder_attention_mask=mask.repeat(batch, 1),
        timestep=timestep,
        **places,
    ).sample
    prediction = official._unpack_latents(prediction, frames, rows, columns)
    theirs = (prediction - (noise - clean))[:, :, 1:].square().mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_first_frame_is_led_to_the_known_one_and_seen_clean(base: LTXBase) -> None:
    generator = torch.Generator().manual_seed(5)
    shape = base.geometry.latent_shape(frames=9, height=64, width=32)
    noisy, other, known = (torch.randn(2, *shape, generator=generator) for _ in range(3))
    time, inputs = torch.tensor([0.3, 1.0]), base.embed("a") | {"first": known[:, :, :1]}
    prediction = base.denoiser()(noisy, time, **inputs)
    reached, _ = base.schedule.split(noisy, prediction, time)
    torch.testing.assert_close(reached[:, :, :1], known[:, :, :1])
    # Whatever noise the first frame has, the later ones are predicted alike.
    noisy[:, :, 0] = other[:, :, 0]
    assert torch.equal(base.denoiser()(noisy, time, **inputs)[:, :, 1:], prediction[:, :, 1:])


@torch.no_grad()
def test_latents_of_a_video_are_normalised(base: LTXBase, official: Any) -> None:
    video = torch.rand(2, 3, 9, 32, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
    vae = official.vae
    modes = torch.cat([vae.encode(one[None]).latent_dist.mode() for one in video])
    expected = official._normalize_latents(modes, vae.latents_mean, vae.latents_std)
    torch.testing.assert_close(base.encode(video), expected)
    first = base.condition(video[:, :, 0], frames=2)["first"]
    torch.testing.assert_close(first, expected[:, :, :1])  # the encoder is causal


@torch.no_grad()
def test_an_adapter_of_no_steps_changes_no_bit(folder: Path) -> None:
    base = open_base(str(folder))
    shape = base.geometry.latent_shape(frames=9, height=32, width=32)
    noisy = torch.randn(1, *shape, generator=torch.Generator().manual_seed(7))
    inputs = base.condition(draw_image((32, 32)), frames=2) | base.embed("a mask")
    before = base.denoiser()(noisy, torch.ones(1), **inputs)
    # Blocks, layers in each, A and B.
    assert len(add_lora(base, rank=4, alpha=4, seed=0)) == 2 * 10 * 2
    assert torch.equal(base.denoiser()(noisy, torch.ones(1), **inputs), before)


@READING
@pytest.mark.slow
def test_a_trained_adapter_gives_the_same_video_in_diffusers(
    folder: Path,
    version: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_noise_pairs: Any,
    freeze: Any,
) -> None:
    """From pairs to a run, to a bundle, and to the official pipeline with `load_lora_weights`."""
    import diffusers

    run = tmp_path / "runs" / "one"
    write_noise_pairs(tmp_path / "pairs", (32, 64))
    options: dict[str, Any] = {
        "size": "64x32",
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
    image = draw_image((32, 64))
    answer = torch.from_numpy(predictor.answer(image.numpy()))
    frozen = freeze(run, tmp_path / "bundle").answer(image.numpy())
    torch.testing.assert_close(torch.from_numpy(frozen), answer, rtol=1e-3, atol=1e-3)

    begin_with(monkeypatch, torch.from_numpy(predictor._noise[:1]))
    official = getattr(diffusers, VERSIONS[version]["pipeline"]).from_pretrained(folder)
    official.set_progress_bar_config(disable=True)
    official.load_lora_weights(run)
    call = call_of(version, image, steps=predictor.recipe.steps, frames=9)
    call |= {"prompt": "a mask", "guidance_scale": 1.0}
    video = official(**call).frames[:, -1]
    assert relative((answer / 2 + 0.5).clamp(0, 1), video) < 1e-4
    official.unload_lora_weights()
    assert relative(official(**call).frames[:, -1], video) > 1e-3


@pytest.mark.parametrize(
    ("version", "key", "value"),
    [
        ("0.9.0", "time_shift_type", "linear"),
        ("0.9.0", "use_karras_sigmas", True),
        ("0.9.0", "_class_name", "DDIMScheduler"),
        ("0.9.5", "use_dynamic_shifting", True),
        ("0.9.5", "use_beta_sigmas", True),
        ("0.9.5", "shift", 3.0),
        ("0.9.5", "shift_terminal", 0.1),
    ],
)
def test_another_scheduler_is_refused(
    tmp_path: Path, make_text_encoder: Any, version: str, key: str, value: Any
) -> None:
    folder = write(tmp_path / "tiny", version, make_text_encoder())
    change(folder / "scheduler" / "scheduler_config.json", **{key: value})
    with pytest.raises(ModelError, match=f"cannot be read .*{key} is {value!r}"):
        open_base(str(folder))


@pytest.mark.parametrize(
    ("version", "pipeline", "is_causal"),
    [("0.9.0", "LTXPipeline", False), ("0.9.5", "LTXPipeline", True)],
)
def test_the_scheduler_tells_the_generations_apart(
    tmp_path: Path, make_text_encoder: Any, version: str, pipeline: str, is_causal: bool
) -> None:
    folder = write(tmp_path / "tiny", version, make_text_encoder())
    change(folder / "model_index.json", _class_name=pipeline)
    base = open_base(str(folder))
    assert isinstance(base, LTXBase)
    assert base.denoiser().is_causal == is_causal


@pytest.mark.parametrize(
    "damage", ["shard", "missing", "index", "pipeline", "scheduler", "patches", "noise"]
)
def test_a_damaged_folder_is_refused(tmp_path: Path, make_text_encoder: Any, damage: str) -> None:
    folder = write(tmp_path / "tiny", "0.9.0", make_text_encoder())
    shard = min((folder / "transformer").glob("*.safetensors"))
    messages = {"pipeline": PIPELINES[0], "patches": "patch_size is 2", "noise": "random noise"}
    if damage == "shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    elif damage == "index":
        (folder / "model_index.json").write_text("{")
    elif damage == "pipeline":
        change(folder / "model_index.json", _class_name="FluxPipeline")
    elif damage == "scheduler":
        change(folder / "scheduler" / "scheduler_config.json", max_image_seq_len=1024)
    elif damage == "patches":
        change(folder / "transformer" / "config.json", patch_size=2)
    else:
        change(folder / "vae" / "config.json", decoder_inject_noise=[True] * 5)
    with pytest.raises(ModelError, match=messages.get(damage, "cannot be read")):
        open_base(str(folder))

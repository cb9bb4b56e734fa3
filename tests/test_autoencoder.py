"""References: the layers run frame by frame, principal components by NumPy's SVD."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewshot_rt.autoencoder import AutoencoderConfig, TinyVideoAutoencoder
from fewshot_rt.autoencoder_layers import Memory, TimeGrow, TimePool

CONFIGS: dict[str, dict[str, Any]] = {
    "pocket": {"latent_channels": 6, "widths": (8, 8, 8), "blocks": (0, 1, 2)},
    "no shortcut": {"latent_channels": 3, "widths": (4, 8, 8), "has_shortcut": False},
    "blocks before": {"latent_channels": 4, "widths": (4, 4, 8), "blocks": (2, 0, 1)},
    "one level": {
        "latent_channels": 4,
        "patch": 4,
        "space": (1,),
        "time": (4,),
        "widths": (8, 8),
        "blocks": (1, 1),
    },
    "time first": {"latent_channels": 4, "space": (1, 2), "time": (2, 1), "widths": (4, 4, 4)},
    "scaled": {
        "latent_channels": 2,
        "widths": (4, 4, 4),
        "latents_mean": (0.5, -1.0),
        "latents_std": (2.0, 0.3),
    },
}
EACH = pytest.mark.parametrize("name", CONFIGS)


def make(name: str) -> TinyVideoAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        autoencoder = TinyVideoAutoencoder(AutoencoderConfig(**CONFIGS[name])).requires_grad_(False)
        # The usual start lets what is seen fade on its way through the layers.
        for parameter in autoencoder.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        return autoencoder


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video_for(autoencoder: TinyVideoAutoencoder, latent_frames: int, seed: int = 0) -> Tensor:
    side = 2 * autoencoder.config.space_factor
    frames = 1 + (latent_frames - 1) * autoencoder.config.time_factor
    return draw(2, 3, frames, side, side + autoencoder.config.space_factor, seed=seed)


def frame_by_frame(layers: nn.Sequential, frames: list[Tensor]) -> list[Tensor]:
    """Run layers as their definition says, one frame after the other. Shapes: each [1, C, H, W]."""
    for layer in layers:
        if isinstance(layer, Memory):
            befores = [torch.zeros_like(frames[0]), *frames[:-1]]
            frames = [layer(now, before) for now, before in zip(frames, befores, strict=True)]
        elif isinstance(layer, TimePool):
            runs = [frames[i : i + layer.stride] for i in range(0, len(frames), layer.stride)]
            frames = [layer(torch.cat(run)) for run in runs]
        elif isinstance(layer, TimeGrow):
            frames = [part for frame in frames for part in layer(frame).split(1)]
        else:
            frames = [layer(frame) for frame in frames]
    return frames


def test_time_layers_keep_the_order_of_frames() -> None:
    frames = draw(6, 2, 3, 3)
    for place in range(3):
        pool = TimePool(2, 3).requires_grad_(False)
        pool.conv.weight.zero_()[:, 2 * place : 2 * place + 2] = torch.eye(2)[..., None, None]
        torch.testing.assert_close(pool(frames), frames[place::3])
    grow = TimeGrow(2, 3).requires_grad_(False)
    scales = torch.cat([k * torch.eye(2) for k in (1, 2, 3)])
    grow.conv.weight.copy_(scales[..., None, None])
    expected = torch.stack([frames, 2 * frames, 3 * frames], dim=1).flatten(0, 1)
    torch.testing.assert_close(grow(frames), expected)


@EACH
@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_the_layers_are_those_run_frame_by_frame(name: str, latent_frames: int) -> None:
    autoencoder = make(name)
    config = autoencoder.config
    if config.has_shortcut:
        for convolution in (autoencoder.shortcut_in, autoencoder.shortcut_out):
            for parameter in convolution.parameters():
                nn.init.zeros_(parameter)
    video = video_for(autoencoder, latent_frames)[:1]
    frames = [video[:, :, max(0, t)] for t in range(1 - config.time_factor, video.shape[2])]
    patches = [nn.functional.pixel_unshuffle(frame, config.patch) for frame in frames]
    raw = frame_by_frame(autoencoder.encoder, patches)
    mean, std = autoencoder.get_buffer("mean"), autoencoder.get_buffer("std")
    latents = torch.stack([(frame - mean) / std for frame in raw], dim=2)
    torch.testing.assert_close(autoencoder.encode(video), latents, rtol=1e-4, atol=1e-5)
    decoded = [
        nn.functional.pixel_shuffle(patch, config.patch)
        for patch in frame_by_frame(autoencoder.decoder, raw)
    ][config.time_factor - 1 :]
    expected = torch.stack(decoded, dim=2)
    torch.testing.assert_close(autoencoder.decode(latents), expected, rtol=1e-4, atol=1e-5)


@EACH
@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_the_last_frame_alone_is_the_last_of_all(name: str, latent_frames: int) -> None:
    autoencoder = make(name).double()  # layers that become one sum in another order
    latents = autoencoder.encode(video_for(autoencoder, latent_frames).double())
    assert latents.shape[2] == latent_frames
    last = autoencoder.decode(latents)[:, :, -1]
    torch.testing.assert_close(autoencoder.decode_last(latents), last, rtol=1e-9, atol=1e-9)


def test_the_last_frame_has_the_gradient_that_it_has_among_all() -> None:
    autoencoder = make("pocket").double()
    latents = autoencoder.encode(video_for(autoencoder, 2).double())
    found, expected = (latents.clone().requires_grad_() for _ in range(2))
    autoencoder.decode_last(found).square().sum().backward()
    autoencoder.decode(expected)[:, :, -1].square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


@EACH
def test_shapes_come_back(name: str) -> None:
    autoencoder = make(name)
    video = video_for(autoencoder, 2)
    latents = autoencoder.encode(video)
    assert latents.shape == (2, autoencoder.config.latent_channels, 2, 2, 3)
    assert autoencoder.decode(latents).shape == video.shape


@EACH
def test_the_first_latent_frame_is_that_of_the_first_image(name: str) -> None:
    autoencoder = make(name)
    video = video_for(autoencoder, 3)
    alone = autoencoder.encode(video[:, :, :1])
    torch.testing.assert_close(autoencoder.encode(video)[:, :, :1], alone, rtol=1e-5, atol=1e-6)


@EACH
def test_later_frames_change_no_earlier_latents_or_pixels(name: str) -> None:
    autoencoder = make(name)
    video, other = video_for(autoencoder, 3), video_for(autoencoder, 3, seed=1)
    known = 1 + autoencoder.config.time_factor
    other[:, :, :known] = video[:, :, :known]
    one, two = autoencoder.encode(video), autoencoder.encode(other)
    torch.testing.assert_close(one[:, :, :2], two[:, :, :2], rtol=1e-5, atol=1e-6)
    assert float((one[:, :, 2] - two[:, :, 2]).abs().max()) > 0.1
    one, two = autoencoder.decode(one), autoencoder.decode(two)
    torch.testing.assert_close(one[:, :, :known], two[:, :, :known], rtol=1e-5, atol=1e-6)


def smooth_images() -> Tensor:
    """Images with strong and weak components. Shapes: [6, 3, 16, 24]."""
    images = nn.functional.interpolate(draw(6, 3, 5, 7), size=(16, 24), mode="bicubic")
    return images + 0.2 * draw(6, 3, 16, 24, seed=1) + torch.tensor([0.3, 0.0, -0.5])[:, None, None]


def cells_of(images: Tensor, side: int) -> np.ndarray:
    """Cut images into cells, with loops. Shapes: [N, 3 x side x side]."""
    array = images.double().numpy()
    _, _, height, width = array.shape
    corners = [(y, x) for y in range(0, height, side) for x in range(0, width, side)]
    cut = [array[:, :, y : y + side, x : x + side] for y, x in corners]
    return np.concatenate(cut).reshape(-1, 3 * side * side)


def test_the_shortcut_is_principal_components() -> None:
    autoencoder, images = make("pocket"), smooth_images()
    autoencoder.fit_shortcut(images)
    cells = cells_of(images, 4)
    powers = np.linalg.svd(cells - cells.mean(axis=0), compute_uv=False) ** 2 / len(cells)
    still = images[:, :, None].expand(-1, -1, 5, -1, -1)
    latents = autoencoder.encode(still)
    errors = autoencoder.decode(latents) - still
    # The error of a cell is the power of the components left out, in every frame.
    for frame in range(5):
        squared = np.square(cells_of(errors[:, :, frame], 4)).sum(axis=1).mean()
        assert squared == pytest.approx(powers[6:].sum(), rel=1e-4)
    # The latents are the components, at the scale of the first.
    flat = latents[:, :, 1].movedim(1, -1).reshape(-1, 6).double().numpy()
    np.testing.assert_allclose(
        flat.T @ flat / len(flat), np.diag(powers[:6] / powers[0]), atol=1e-4
    )


def test_the_shortcut_holds_the_mean_of_the_frames() -> None:
    autoencoder, images = make("pocket"), smooth_images()
    autoencoder.fit_shortcut(images)
    video = images[None, :5].transpose(1, 2)
    last = autoencoder.encode(video)[:, :, 1]
    each = [autoencoder.encode(video[:, :, t : t + 1])[:, :, 0] for t in range(1, 5)]
    torch.testing.assert_close(last, torch.stack(each).mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pocket", "no shortcut"])
def test_it_can_be_exported(name: str) -> None:
    autoencoder, batch = make(name), torch.export.Dim("batch", min=1, max=4)
    video = video_for(autoencoder, 2)
    latents, image = autoencoder.encode(video), video[:, :, :1]
    for method, example in (("encode", video), ("encode", image), ("decode_last", latents)):
        role = _Role(autoencoder, method)
        program = torch.export.export(role, (example,), dynamic_shapes=({0: batch},))
        for given in (example, example[:1], torch.cat([example, example.flip(0)])):
            expected = getattr(autoencoder, method)(given)
            torch.testing.assert_close(program.module()(given), expected, rtol=1e-5, atol=1e-6)


class _Role(nn.Module):
    def __init__(self, autoencoder: TinyVideoAutoencoder, method: str) -> None:
        super().__init__()
        self.autoencoder, self.method = autoencoder, method

    def forward(self, tensor: Tensor) -> Any:
        if self.method == "encode":
            return self.autoencoder.encode(tensor)
        return self.autoencoder.decode_last(tensor)


@EACH
def test_a_configuration_survives_json(name: str) -> None:
    config = AutoencoderConfig(**CONFIGS[name])
    assert AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_factors_are_products() -> None:
    config = AutoencoderConfig(patch=2, space=(2, 2), time=(2, 3), widths=(4, 4, 4))
    assert (config.space_factor, config.time_factor) == (8, 6)

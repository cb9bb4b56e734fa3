"""References: TAEHV's published layers, run here frame by frame from weights by name.

Names, shapes and order are those of github.com/madebyollin/taehv (taehv.py at 1f14a56); the weights
are random.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny.cogvideox
import tiny.ltx
import tiny.wan
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fewshot_rt.bases import open_base
from fewshot_rt.errors import ModelError
from fewshot_rt.export.build import export_bundle
from fewshot_rt.export.bundle import open_bundle
from fewshot_rt.fit import fit
from fewshot_rt.runs import open_merged, open_run
from fewshot_rt.spec import Geometry
from fewshot_rt.taehv import Taehv, TinyFile, read_taehv
from fewshot_rt.train_config import TrainConfig

Steps = list[tuple[str, int, int]]
WIDTHS = ((64, 64, 64, 64), (256, 128, 64, 64))  # of the encoder and of the decoder, in their order
NARROW = ((4, 6, 4, 8), (8, 6, 4, 6))
# Channels, patch, and the times that the encoder's levels merge.
PUBLISHED: dict[str, tuple[int, int, tuple[int, int, int]]] = {
    "taew2_1": (16, 1, (2, 2, 1)),
    "taecvx": (16, 1, (2, 2, 1)),
    "taew2_2": (48, 2, (2, 2, 1)),
    "taeltx_2": (128, 4, (2, 2, 2)),
}
KINDS = {
    "wan 2.1": (3, 1, (2, 2, 1)),
    "wan 2.2": (4, 2, (2, 2, 1)),
    "ltx 2": (5, 4, (2, 2, 2)),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def shapes(
    channels: int, patch: int, times: tuple[int, int, int], widths: Any = WIDTHS
) -> dict[str, tuple[int, ...]]:
    """List what a file holds."""
    (first, *down), up = widths
    found: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, inside: int, outside: int, *, has_bias: bool = True) -> None:
        found[f"{name}.weight"] = (outside, inside, 3, 3)
        if has_bias:
            found[f"{name}.bias"] = (outside,)

    def memory(name: str, width: int) -> None:
        convolution(f"{name}.conv.0", 2 * width, width)
        convolution(f"{name}.conv.2", width, width)
        convolution(f"{name}.conv.4", width, width)

    convolution("encoder.0", 3 * patch**2, first)
    for place, before, width, time in zip((2, 7, 12), (first, *down), down, times, strict=False):
        found[f"encoder.{place}.conv.weight"] = (before, before * time, 1, 1)
        convolution(f"encoder.{place + 1}", before, width, has_bias=False)
        for block in range(2, 5):
            memory(f"encoder.{place + block}", width)
    convolution("encoder.17", down[-1], channels)
    convolution("decoder.1", channels, up[0])
    for place, width, after, time in zip((3, 9, 15), up, up[1:], times[::-1], strict=False):
        for block in range(3):
            memory(f"decoder.{place + block}", width)
        found[f"decoder.{place + 4}.conv.weight"] = (width * time, width, 1, 1)
        convolution(f"decoder.{place + 5}", width, after, has_bias=False)
    convolution("decoder.22", up[-1], 3 * patch**2)
    return found


def draw_weights(kind: tuple[int, int, tuple[int, int, int]], seed: int = 0) -> dict[str, Tensor]:
    """Draw weights so that signals neither fade nor grow, and pixels are mostly inside [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(*kind, NARROW).items():
        scale = 0.1 if len(shape) == 1 else (2 / np.prod(shape[1:])) ** 0.5
        weights[name] = torch.randn(shape, generator=generator) * scale
    weights["decoder.22.weight"] /= 60
    weights["decoder.22.bias"] += 0.5
    return weights


def write(folder: Path, name: str, weights: dict[str, Tensor]) -> Path:
    path = folder / f"{name}.safetensors"
    save_file(weights, path)
    return path


def geometry_of(kind: tuple[int, int, tuple[int, int, int]]) -> Geometry:
    channels, patch, times = kind
    return Geometry(
        channels=channels,
        time_factor=int(np.prod(times)),
        space_factor=8 * patch,
        multiple=8 * patch,
        native=(64, 64),
        frames=(9,),
    )


def make(folder: Path, kind: str, *, keeps_even: bool = False) -> tuple[Taehv, dict[str, Tensor]]:
    weights = draw_weights(KINDS[kind])
    path = write(folder, "taex", weights)
    file = TinyFile(name="taex", encodes=True, keeps_even=keeps_even)
    tiny_one = read_taehv(path, file, geometry_of(KINDS[kind])).requires_grad_(False)
    return tiny_one, weights


ENCODER: Steps = [("convolve", 0, 1), ("rectify", 1, 0)]
for _at in (2, 7, 12):
    ENCODER += [("pool", _at, 0), ("convolve", _at + 1, 2)]
    ENCODER += [("remember", _at + add, 0) for add in (2, 3, 4)]
ENCODER += [("convolve", 17, 1)]
DECODER: Steps = [("squash", 0, 0), ("convolve", 1, 1), ("rectify", 2, 0)]
for _at in (3, 9, 15):
    DECODER += [("remember", _at + add, 0) for add in (0, 1, 2)]
    DECODER += [("enlarge", _at + 3, 0), ("grow", _at + 4, 0), ("convolve", _at + 5, 1)]
DECODER += [("rectify", 21, 0), ("convolve", 22, 1)]


def push(
    weights: dict[str, Tensor], steps: Steps, kept: dict[int, Any], frame: Tensor
) -> list[Tensor]:
    """Send one frame through the layers; give what comes out. kept: what layers remember."""
    if not steps:
        return [frame]
    (step, place, stride), *rest = steps

    def convolve(name: str, inside: Tensor, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        bias = weights.get(f"{name}.bias")
        return functional.conv2d(inside, weight, bias, stride=stride, padding=padding)

    results = [frame]
    if step == "convolve":
        results = [convolve(str(place), frame, stride)]
    elif step == "rectify":
        results = [frame.clamp(min=0)]
    elif step == "squash":
        results = [3 * torch.tanh(frame / 3)]
    elif step == "enlarge":
        results = [frame.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)]
    elif step == "remember":
        inside = torch.cat([frame, kept.get(place, torch.zeros_like(frame))], dim=1)
        kept[place] = frame
        for layer in (0, 2, 4):
            inside = convolve(f"{place}.conv.{layer}", inside.clamp(min=0) if layer else inside)
        results = [(inside + frame).clamp(min=0)]
    elif step == "pool":
        waiting = [*kept.get(place, []), frame]
        is_full = len(waiting) * frame.shape[1] == weights[f"{place}.conv.weight"].shape[1]
        results = [convolve(f"{place}.conv", torch.cat(waiting, dim=1))] if is_full else []
        kept[place] = [] if is_full else waiting
    elif step == "grow":
        results = list(convolve(f"{place}.conv", frame).split(frame.shape[1], dim=1))
    return [last for one in results for last in push(weights, rest, kept, one)]


def run_half(half: str, steps: Steps, weights: dict[str, Tensor], frames: list[Tensor]) -> Tensor:
    named = {n.removeprefix(f"{half}."): v for n, v in weights.items() if n.startswith(half)}
    kept: dict[int, Any] = {}
    return torch.stack([last for one in frames for last in push(named, steps, kept, one)], dim=2)


def fold(frame: Tensor, patch: int) -> Tensor:
    """Fold pixels into channels: colour, then down, then across."""
    batch, colours, height, width = frame.shape
    cut = frame.reshape(batch, colours, height // patch, patch, width // patch, patch)
    return cut.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // patch, width // patch)


def unfold(frame: Tensor, patch: int) -> Tensor:
    batch, _, height, width = frame.shape
    cut = frame.reshape(batch, 3, patch, patch, height, width)
    return cut.permute(0, 1, 4, 2, 5, 3).reshape(batch, 3, height * patch, width * patch)


def encode(weights: dict[str, Tensor], video: Tensor, *, patch: int, times: int) -> Tensor:
    """Encode as published: pixels from 0 to 1, the last frame repeated until frames are whole."""
    frames = list(((video + 1) / 2).unbind(2))
    while len(frames) % times:
        frames.append(frames[-1])
    return run_half("encoder", ENCODER, weights, [fold(frame, patch) for frame in frames])


def decode(weights: dict[str, Tensor], latents: Tensor, *, patch: int, skipped: int) -> Tensor:
    """Decode as published: the first frames skipped, pixels clamped to 0 to 1."""
    frames = run_half("decoder", DECODER, weights, list(latents.unbind(2))).unbind(2)
    video = torch.stack([unfold(frame, patch) for frame in frames[skipped:]], dim=2)
    return video.clamp(0, 1) * 2 - 1


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video_of(geometry: Geometry, latent_frames: int) -> Tensor:
    side = geometry.space_factor
    frames = 1 + (latent_frames - 1) * geometry.time_factor
    return draw(2, 3, frames, 2 * side, 3 * side).mul(0.5).clamp(-1, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_have_our_layers(name: str, tmp_path: Path) -> None:
    kind = PUBLISHED[name]
    wanted = shapes(*kind)
    path = tmp_path / f"{name}.pth"
    torch.save({n: torch.zeros(shape, dtype=torch.float16) for n, shape in wanted.items()}, path)
    found = read_taehv(path, TinyFile(name=name, encodes=True), geometry_of(kind)).state_dict()
    assert {n: tuple(v.shape) for n, v in found.items()} == wanted
    assert {v.dtype for v in found.values()} == {torch.float32}


@EACH
@pytest.mark.parametrize("latent_frames", [1, 2, 3])
def test_it_encodes_as_published(kind: str, latent_frames: int, tmp_path: Path) -> None:
    found, weights = make(tmp_path, kind)
    video = video_of(geometry_of(KINDS[kind]), latent_frames)
    times = geometry_of(KINDS[kind]).time_factor
    expected = encode(weights, video, patch=KINDS[kind][1], times=times)
    assert expected.shape[2] == latent_frames
    torch.testing.assert_close(found.encode(video), expected, rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.parametrize("latent_frames", [1, 2, 3])
@pytest.mark.parametrize("keeps_even", [False, True])
def test_it_decodes_as_published(
    kind: str, latent_frames: int, keeps_even: bool, tmp_path: Path
) -> None:
    found, weights = make(tmp_path, kind, keeps_even=keeps_even)
    latents = 2 * draw(2, KINDS[kind][0], latent_frames, 2, 3)
    times = geometry_of(KINDS[kind]).time_factor
    skipped = 0 if keeps_even and latent_frames == 2 else times - 1
    expected = decode(weights, latents, patch=KINDS[kind][1], skipped=skipped)
    assert (expected.abs() < 1).float().mean() > 0.3  # else it would be the clamp alone
    video = found.decode(latents)
    torch.testing.assert_close(video, expected, rtol=1e-5, atol=1e-5)


@EACH
def test_the_last_frame_alone_is_the_last_of_all(kind: str, tmp_path: Path) -> None:
    found, _ = make(tmp_path, kind)
    for latent_frames in (1, 2, 3, 10):  # at most 8 are needed
        latents = draw(2, KINDS[kind][0], latent_frames, 2, 3)
        last = found.decode(latents)[:, :, -1]
        torch.testing.assert_close(found.decode_last(latents), last, rtol=0, atol=1e-6)


FIVE_B = TinyFile(name="taew2_2", encodes=True)


def spoil(kind: str, folder: Path) -> Path:
    """Write what is no file of weights for Wan2.2-TI2V-5B, at the sizes of these tests."""
    good = draw_weights(KINDS["wan 2.2"])
    path = folder / "taew2_2.pth"
    if kind == "missing":
        return path
    if kind == "of another model":
        return write(folder, "taecvx", good)
    if kind == "of other latents":
        return write(folder, "lighttaew2_2", good)
    if kind == "of another size":
        return write(folder, "mine", draw_weights(KINDS["wan 2.1"]))
    if kind == "of other layers":
        return write(folder, "taew2_2_super", {"decoder.0.weight": torch.zeros(8, 4, 1, 1)})
    if kind == "with more layers":
        return write(folder, "taew2_2", good | {"decoder.23.bias": torch.zeros(3)})
    if kind == "cut off":
        path.write_bytes(write(folder, "whole", good).read_bytes()[:1000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "a list":
        torch.save([torch.zeros(3)], path)
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "there is no file"),
        ("of another model", "another model"),
        ("of other latents", "another model"),
        ("of another size", "3 channels for 8 x 8 pixels, 4 frames, those of the base 4"),
        ("of other layers", "no tiny autoencoder"),
        ("with more layers", "decoder.23"),
        ("cut off", "does not fit"),
        ("empty", "does not fit"),
        ("a list", "weights by name"),
    ],
)
def test_a_wrong_file_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    path = spoil(kind, tmp_path)
    with pytest.raises(ModelError, match=said) as refused:
        read_taehv(path, FIVE_B, geometry_of(KINDS["wan 2.2"]))
    assert "Take taew2_2.pth or taew2_2.safetensors from github.com" in str(refused.value)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory, make_text_encoder: Any) -> Any:
    """A function that gives the folder of a tiny Wan of some version."""
    folders: dict[str, Path] = {}

    def give(version: str) -> Path:
        if version not in folders:
            place = tmp_path_factory.mktemp("wan") / version
            text = make_text_encoder(is_multilingual=True)
            folders[version] = tiny.wan.write(place, version, text)
        return folders[version]

    return give


@torch.no_grad()
def test_a_base_with_a_clean_first_frame_uses_both_halves(wan: Any, tmp_path: Path) -> None:
    weights = draw_weights(KINDS["wan 2.2"])
    path = write(tmp_path, "taew2_2", weights)
    own, base = open_base(str(wan("2.2-5B"))), open_base(str(wan("2.2-5B")), vae=str(path))
    video = video_of(base.geometry, 2)[:, :, :, :32, :32]
    latents = base.encode(video)
    torch.testing.assert_close(
        latents, encode(weights, video, patch=2, times=4), rtol=1e-5, atol=1e-5
    )
    still = video[:, :, :1]
    first = base.condition(video[:, :, 0], frames=2)["first"]
    torch.testing.assert_close(
        first, encode(weights, still, patch=2, times=4), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        base.decode(latents), decode(weights, latents, patch=2, skipped=3), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(base.decode_last(latents), base.decode(latents)[:, :, -1])
    # The large autoencoder is let go; latents and adapters of the two do not mix.
    assert [type(network) for network in base.networks().values()] == [Taehv]
    assert base.revision.startswith(f"{own.revision}+")
    other = write(tmp_path, "taew2_2", draw_weights(KINDS["wan 2.2"], seed=5))
    assert open_base(str(wan("2.2-5B")), vae=str(other)).revision != base.revision


@torch.no_grad()
@pytest.mark.parametrize("version", ["2.1", "2.2-A14B"])
def test_a_base_that_sees_grey_frames_encodes_by_itself(
    wan: Any, version: str, tmp_path: Path
) -> None:
    weights = draw_weights((4, 1, (2, 2, 1)))
    path = write(tmp_path, "taew2_1", weights)
    own, base = open_base(str(wan(version))), open_base(str(wan(version)), vae=str(path))
    video = draw(1, 3, 5, 32, 64).clamp(-1, 1)
    latents = own.encode(video)
    assert torch.equal(base.encode(video), latents)
    expected = own.condition(video[:, :, 0], frames=2)
    for name, value in base.condition(video[:, :, 0], frames=2).items():
        assert torch.equal(value, expected[name])
    torch.testing.assert_close(
        base.decode(latents), decode(weights, latents, patch=1, skipped=3), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(base.decode_last(latents), base.decode(latents)[:, :, -1])


@torch.no_grad()
def test_a_file_without_an_encoder_leaves_encoding_to_the_base(wan: Any, tmp_path: Path) -> None:
    weights = {n: v for n, v in draw_weights(KINDS["wan 2.2"]).items() if n.startswith("decoder")}
    path = write(tmp_path, "taew2_2", weights)
    own, base = open_base(str(wan("2.2-5B"))), open_base(str(wan("2.2-5B")), vae=str(path))
    video = draw(1, 3, 5, 32, 32).clamp(-1, 1)
    latents = own.encode(video)
    assert torch.equal(base.encode(video), latents)
    torch.testing.assert_close(
        base.decode(latents), decode(weights, latents, patch=2, skipped=3), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("version", tiny.cogvideox.VERSIONS)
@pytest.mark.parametrize(("frames", "decoded"), [(5, 8), (9, 9)])
def test_cogvideox_decodes_unscaled_latents(
    version: str, frames: int, decoded: int, make_text_encoder: Any, tmp_path: Path
) -> None:
    folder = tiny.cogvideox.write(tmp_path / version, version, make_text_encoder())
    weights = draw_weights((4, 1, (2, 2, 1)))
    path = write(tmp_path, "taecvx", weights)
    own, base = open_base(str(folder)), open_base(str(folder), vae=str(path))
    video = draw(1, 3, frames, 16, 16).clamp(-1, 1)
    latents = own.encode(video)
    assert torch.equal(base.encode(video), latents)
    assert own.decode(latents).shape[2] == base.decode(latents).shape[2] == decoded
    seen = latents[:, :, -(1 + frames // 4) :] / 0.7
    expected = decode(weights, seen, patch=1, skipped=0 if decoded == 8 else 3)
    torch.testing.assert_close(base.decode(latents), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(base.decode_last(latents), expected[:, :, -1], rtol=1e-5, atol=1e-5)


def test_bases_without_a_published_file_say_so(
    make_text_encoder: Any, tmp_path: Path, tiny_base_folder: Path
) -> None:
    version = next(iter(tiny.ltx.VERSIONS))
    folder = tiny.ltx.write(tmp_path / "ltx", version, make_text_encoder())
    with pytest.raises(ModelError, match=r"no tiny autoencoder is known.*Leave out --vae"):
        open_base(str(folder), vae="taeltx_2.pth")
    with pytest.raises(ModelError, match=r"tiny one already\. Leave out --vae"):
        open_base(str(tiny_base_folder), vae="taew2_1.pth")


@pytest.fixture
def run(wan: Any, tmp_path: Path, write_noise_pairs: Any) -> Path:
    """A run of two steps on Wan2.2-TI2V-5B with a tiny autoencoder."""
    path = write(tmp_path, "taew2_2", draw_weights(KINDS["wan 2.2"]))
    settings = 'transition = { kind = "repeat_target", frames = 5 }\n'
    write_noise_pairs(tmp_path / "pairs", (32, 32), settings=settings)
    options: dict[str, Any] = {
        "steps": 2,
        "rank": 2,
        "rate": 0.02,
        "variants": 1,
        "augment": "none",
    }
    config = TrainConfig(base=str(wan("2.2-5B")), vae=str(path), size="32", device="cpu", **options)
    *_, last = fit(tmp_path / "pairs", tmp_path / "runs" / "one", config)
    assert last.step == 2
    return tmp_path / "runs" / "one"


def test_a_run_keeps_its_tiny_autoencoder(run: Path, tmp_path: Path) -> None:
    image = draw(1, 3, 32, 32).clamp(-1, 1).numpy().astype(np.float32)
    merged, _, values = open_merged(run)
    assert [type(network) for network in merged.networks().values()] == [Taehv]
    assert values["base_revision"] == merged.revision
    answer = open_run(run).answer(image)
    assert np.abs(answer).max() <= 1
    # Weights that changed, were lost, or were never meant are not silently taken.
    write(tmp_path, "taew2_2", draw_weights(KINDS["wan 2.2"], seed=5))
    with pytest.raises(ModelError, match="made for base"):
        open_run(run)
    (tmp_path / "taew2_2.safetensors").unlink()
    with pytest.raises(ModelError, match="there is no file"):
        open_run(run)
    config = run / "config.json"
    values = json.loads(config.read_text())
    del values["train"]["vae"]
    config.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="made for base"):
        open_run(run)


@pytest.mark.slow
def test_its_bundle_needs_no_pytorch(run: Path, tmp_path: Path) -> None:
    """Against the run itself, in PyTorch."""
    image = draw(1, 3, 32, 32).clamp(-1, 1).numpy().astype(np.float32)
    merged, _, values = open_merged(run)
    *_, written = export_bundle(
        merged,
        recipe=values["recipe"],
        prompt=values["prompt"],
        engine="onnx",
        precision="fp32",
        folder=tmp_path / "bundle",
        origin={},
    )
    assert written.stage == "write"
    answer = open_bundle(tmp_path / "bundle").answer(image)
    np.testing.assert_allclose(answer, open_run(run).answer(image), rtol=1e-3, atol=1e-3)

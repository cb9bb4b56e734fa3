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
from tiny.taehv import (
    KINDS,
    PUBLISHED,
    decode,
    draw,
    draw_weights,
    encode,
    geometry_of,
    make,
    shapes,
    video_of,
    write,
)

from fewshot_rt.bases import open_base
from fewshot_rt.errors import ModelError
from fewshot_rt.export.engine import get_engine
from fewshot_rt.export.model import precision_of
from fewshot_rt.fit import fit
from fewshot_rt.runs import open_merged, open_run
from fewshot_rt.taehv import Taehv, TinyFile, read_taehv
from fewshot_rt.train_config import TrainConfig

EACH = pytest.mark.parametrize("kind", KINDS)


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
    # In fp64: copies of one image are summed in another order.
    found, weights = make(tmp_path, kind)
    weights = {name: weight.double() for name, weight in weights.items()}
    video = video_of(geometry_of(KINDS[kind]), latent_frames).double()
    times = geometry_of(KINDS[kind]).time_factor
    expected = encode(weights, video, patch=KINDS[kind][1], times=times)
    assert expected.shape[2] == latent_frames
    torch.testing.assert_close(found.double().encode(video), expected, rtol=1e-9, atol=1e-9)


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
    found = make(tmp_path, kind)[0].double()  # layers that become one sum in another order
    for latent_frames in (1, 2, 3, 10):  # at most 8 are needed
        latents = draw(2, KINDS[kind][0], latent_frames, 2, 3).double()
        last = found.decode(latents)[:, :, -1]
        torch.testing.assert_close(found.decode_last(latents), last, rtol=0, atol=1e-9)


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


@pytest.mark.parametrize(
    ("version", "name", "tiny_roles"),
    [("2.2-5B", "taew2_2", ("encoder", "decoder")), ("2.1", "taew2_1", ("decoder",))],
)
def test_what_a_tiny_one_decodes_may_be_in_few_bits(
    version: str, name: str, tiny_roles: tuple[str, ...], wan: Any, tmp_path: Path
) -> None:
    """Wan's own autoencoder stays in fp32, and the whole encoder, which may hold more."""
    kind = KINDS["wan 2.2"] if name == "taew2_2" else (4, 1, (2, 2, 1))
    path = write(tmp_path, name, draw_weights(kind))
    own, base = open_base(str(wan(version))), open_base(str(wan(version)), vae=str(path))
    assert (own.tiny_roles, base.tiny_roles) == ((), tiny_roles)
    for engine, bits in (("onnx", "int8"), ("openvino", "int8"), ("aoti", "bf16")):
        tool = get_engine(engine)
        for role, expected in (("encoder", "fp32"), ("decoder", bits), ("denoiser", "int8")):
            assert precision_of(role, base, "int8", tool) == expected
        assert precision_of("decoder", own, "int8", tool) == "fp32"


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
        "hold_out": 0,
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
def test_its_bundle_needs_no_pytorch(run: Path, tmp_path: Path, freeze: Any) -> None:
    """Against the run itself, in PyTorch."""
    image = draw(1, 3, 32, 32).clamp(-1, 1).numpy().astype(np.float32)
    answer = freeze(run, tmp_path / "bundle").answer(image)
    np.testing.assert_allclose(answer, open_run(run).answer(image), rtol=1e-3, atol=1e-3)

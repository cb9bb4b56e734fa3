"""pocket: the layout that all bases share, and the weights in the box."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fewshot_rt.bases import open_base
from fewshot_rt.bases.pocket import WEIGHTS, PromptTable, make_waves
from fewshot_rt.errors import ConfigError, ModelError
from fewshot_rt.images import to_model
from fewshot_rt.sample import sample
from fewshot_rt.world import VOCABULARY, make_clips


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3])
def test_the_sampler_ends_on_the_given_first_frame(tiny_base, steps):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    conditions = tiny_base.condition(image, frames=2) | tiny_base.embed("mask")
    noise = torch.randn(2, 8, 2, 8, 8, generator=generator)
    *_, last = sample(
        lambda x, t: tiny_base.denoiser()(x, t, **conditions),
        noise,
        schedule=tiny_base.schedule,
        steps=steps,
    )
    torch.testing.assert_close(last.latents[:, :, :1], conditions["first"])


@torch.no_grad()
def test_the_denoiser_is_diffusers_on_later_frames_with_the_first_and_waves_as_channels(tiny_base):
    """Against the transformer called as the Wan image-to-video pipeline does, frame by frame."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 8, 3, 8, 8, generator=generator)
    first = torch.randn(2, 8, 1, 8, 8, generator=generator)
    prompt = tiny_base.embed("mask")["prompt"]
    waves = make_waves(8, (8, 8), device=noisy.device)[:, :, None].expand(2, -1, 2, -1, -1)
    beside = torch.cat([noisy[:, :, 1:], torch.cat([first, first], dim=2), waves], dim=1)
    expected = tiny_base.denoiser().transformer(
        hidden_states=beside,
        timestep=torch.tensor([700.0, 300.0]),
        encoder_hidden_states=torch.cat([prompt, prompt]),
        return_dict=False,
    )[0]
    found = tiny_base.denoiser()(noisy, torch.tensor([0.7, 0.3]), first, prompt)
    torch.testing.assert_close(found[:, :, 1:], expected)


def test_waves_tell_mirrored_places_apart_at_any_size():
    """Against the formula; and a mirrored picture has the sines of places negated."""
    waves = make_waves(16, (4, 6), device=torch.device("cpu"))[0]
    assert waves.shape == (16, 4, 6)
    row, column = 1, 4
    for octave in range(4):
        for side, place in enumerate(((row + 0.5) / 4 * 2 - 1, (column + 0.5) / 6 * 2 - 1)):
            angle = math.pi / 2 * 2**octave * place
            at = 4 * octave + 2 * side
            expected = torch.tensor([math.sin(angle), math.cos(angle)])
            torch.testing.assert_close(waves[at : at + 2, row, column], expected)
    across = waves[2::4]  # sines along the width
    torch.testing.assert_close(across.flip(-1), -across)
    # A pixel's place does not depend on the size: 2x2 cells of a finer grid average to about it.
    fine = make_waves(16, (16, 24), device=torch.device("cpu"))[0]
    coarse = make_waves(16, (8, 12), device=torch.device("cpu"))[0]
    averaged = torch.nn.functional.avg_pool2d(fine, 2)
    assert float((averaged - coarse).abs()[:8].max()) < 0.02


def test_unknown_words_say_nothing():
    table = PromptTable(("", "mask", "edge"), torch.eye(3))
    assert table.ids("") == [0, 0, 0, 0]
    assert table.ids("an Edge of the mask") == [2, 1, 2, 1]
    assert table.ids("edge") == [2, 2, 2, 2]
    assert torch.equal(table.embed("nothing known"), table.embed(""))


@pytest.mark.parametrize(
    "name", ["vae/config.json", "transformer/config.json", "prompt/words.json", "vae"]
)
def test_a_base_with_missing_files_is_refused(tiny_base_folder, name):
    path = tiny_base_folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        open_base(str(tiny_base_folder))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        open_base("pocket", device="abacus")


class TestShippedWeights:
    """What is in the box was pretrained, and small enough to ship."""

    def test_size(self):
        size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())
        assert size < 24e6

    def test_words_are_those_of_the_world(self):
        assert open_base("pocket").prompts.words == VOCABULARY  # type: ignore[attr-defined]

    @torch.no_grad()
    def test_the_autoencoder_keeps_a_photograph(self):
        from skimage.data import coins

        base = open_base("pocket")
        image = to_model(np.repeat(coins()[:256, :256, None], 3, axis=-1), (128, 128))
        video = torch.from_numpy(image)[None, :, None].expand(-1, -1, 5, -1, -1)
        restored = base.decode_last(base.encode(video)).numpy()[0]
        noise = float(np.square(restored - image).mean())
        # 32 dB when it was trained; [-1, 1] has a range of 2.
        assert 10 * np.log10(4 / noise) > 30

    @torch.no_grad()
    @pytest.mark.parametrize("is_noisy", [True, False])
    def test_the_denoiser_knows_the_world(self, is_noisy):
        """On fresh clips it leaves less than 3/4 of what a blind guess (the mean) leaves."""
        base = open_base("pocket")
        generator = torch.Generator().manual_seed(123)
        clips = make_clips(
            12, size=64, generator=generator, pace="repeat_target", events=("focus",)
        )
        clean = base.encode(clips.video)
        noise = torch.randn(clean.shape, generator=generator) * is_noisy
        moment = torch.full((len(clean),), 0.6 if is_noisy else 1.0)
        noisy = base.schedule.noise(clean, noise, moment)
        prediction = base.denoiser()(noisy, moment, clean[:, :, :1], **base.embed("focus"))
        found, _ = base.schedule.split(noisy, prediction, moment)
        error = (found - clean)[:, :, 1:].square().mean()
        blind = clean[:, :, 1:].var(dim=(0, 2, 3, 4)).mean()
        assert error < 0.75 * blind


def test_weights_in_the_tree_have_a_card():
    assert "procedural world" in (Path(WEIGHTS) / "README.md").read_text(encoding="utf-8")

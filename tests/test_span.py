"""Short transitions whose answer lies where a longer video ends.

References: diffusers' ChronoEdit, whose rotary embedding places two latent frames 8 apart; the
tables that diffusers and our own denoisers have for the longer video.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import cogvideox, ltx, relative, wan
from torch import Tensor, nn

from fewshot_rt.bases import open_base
from fewshot_rt.errors import ConfigError, ModelError
from fewshot_rt.export.build import export_bundle
from fewshot_rt.fit import fit
from fewshot_rt.runs import _open, open_run
from fewshot_rt.task import Task
from fewshot_rt.train_config import TrainConfig
from fewshot_rt.transition import Transition

SHORT = Transition(kind="repeat_target", frames=5, span=29)  # ChronoEdit's


def open_wan(folder: Path, text: Any, version: str) -> Any:
    """A tiny Wan whose queries and keys are large enough for attention to tell places apart."""
    base: Any = open_base(str(wan.write(folder, version, text(is_multilingual=True))))
    for name, parameter in base.denoiser().named_parameters():
        if "norm_q" in name or "norm_k" in name:
            nn.init.constant_(parameter, 3.0)
    return base


def rotary(base: Any, frames: int) -> tuple[Tensor, Tensor]:
    """The tables that a CogVideoX denoiser makes for so many latent frames."""
    found: tuple[Tensor, Tensor] = base.denoiser()._rotary(torch.zeros(1, 4, frames, 4, 6))
    return found


@torch.no_grad()
def test_two_latent_frames_lie_as_chronoedit_has_them(
    tmp_path: Path, make_text_encoder: Any
) -> None:
    from diffusers import ChronoEditTransformer3DModel

    base = open_wan(tmp_path / "wan", make_text_encoder, "2.1")
    transformer = base.denoiser().transformer
    official: Any = ChronoEditTransformer3DModel(
        **{k: v for k, v in transformer.config.items() if not k.startswith("_")}
    )
    official.load_state_dict(transformer.state_dict())
    generator = torch.Generator().manual_seed(0)
    noisy, image = torch.randn(1, 4, 2, 8, 8, generator=generator), torch.rand(1, 3, 64, 64)
    conditions, prompt = base.condition(image, frames=2), base.embed("a mask")["prompt"]
    expected = official(
        hidden_states=torch.cat([noisy, conditions["known"]], dim=1),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=prompt,
        encoder_hidden_states_image=conditions["image_tokens"],
        return_dict=False,
    )[0]

    def predict() -> Tensor:
        found: Tensor = base.denoiser()(noisy, torch.tensor([0.5]), prompt, **conditions)
        return found

    near = relative(predict(), expected)
    base.play(SHORT)
    assert relative(predict(), expected) < 1e-6
    assert near > 1e-3
    base.play(Transition(frames=5))
    assert relative(predict(), expected) == near


@torch.no_grad()
@pytest.mark.parametrize(("frames", "span", "merged"), [(9, 49, 7), (9, 9, 2)])
def test_cogvideox_takes_the_angles_of_a_longer_video(
    tmp_path: Path, make_text_encoder: Any, frames: int, span: int, merged: int
) -> None:
    base: Any = open_base(str(cogvideox.write(tmp_path / "cog", "1.5", make_text_encoder())))
    short, long = rotary(base, 4), rotary(base, 2 * merged)
    base.play(Transition(kind="discrete", frames=frames, span=span))
    for found, own, whole in zip(rotary(base, 4), short, long, strict=True):
        first, last = found.chunk(2)
        torch.testing.assert_close(first, own.chunk(2)[0], rtol=0, atol=0)
        torch.testing.assert_close(last, whole.chunk(merged)[-1], rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("version", ltx.VERSIONS)
def test_ltx_tells_the_last_frame_the_seconds_of_a_longer_video(
    tmp_path: Path, make_text_encoder: Any, version: str
) -> None:
    base: Any = open_base(str(ltx.write(tmp_path / "ltx", version, make_text_encoder())))
    places = base.denoiser()._places
    short, long = (places(torch.zeros(1, 4, frames, 2, 3)) for frames in (2, 7))
    base.play(Transition(kind="discrete", frames=9, span=49))
    expected = torch.cat([short[..., :6], long[..., -6:]], dim=-1)
    torch.testing.assert_close(places(torch.zeros(1, 4, 2, 2, 3)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("version", ["2.2-5B", "2.2-A14B"])
def test_runs_and_exports_keep_the_place(
    tmp_path: Path, make_text_encoder: Any, write_noise_pairs: Any, version: str
) -> None:
    folder = wan.write(tmp_path / "wan", version, make_text_encoder(is_multilingual=True))
    settings = 'transition = {kind = "repeat_target", frames = 5, span = 29}'
    write_noise_pairs(tmp_path / "pairs", (32, 32), settings=settings)
    run = tmp_path / "runs" / "one"
    config = TrainConfig(
        base=str(folder),
        hold_out=0,
        size="32x32",
        steps=1,
        batch=1,
        rank=2,
        rate=0.02,
        objective="diffusion",
    )
    *_, _ = fit(tmp_path / "pairs", run, config)  # requires that the run answers as trained
    base, adapter, values = _open(run, device="cpu", weights=None)
    assert base.denoiser().last_place == 7
    adapter.merge(base)
    *_, last = export_bundle(
        base,
        recipe=values["recipe"],
        prompt=values["prompt"],
        engine="eager",
        precision="fp32",
        folder=tmp_path / "bundle",
        origin={},
    )
    assert last.stage == "write"
    assert open_run(run).recipe.latent_shape[1] == 2


def test_what_no_base_can_do_is_said(
    tmp_path: Path, make_text_encoder: Any, tiny_base: Any
) -> None:
    with pytest.raises(ConfigError, match="9 frames cannot span 5"):
        Transition(frames=9, span=5)
    with pytest.raises(ModelError, match="and span in the transition"):
        tiny_base.play(SHORT)
    base: Any = open_base(str(cogvideox.write(tmp_path / "cog", "1.5", make_text_encoder())))
    with pytest.raises(ModelError, match="merges 5 frames into one"):
        base.play(SHORT)
    with pytest.raises(ModelError, match="a span of 12 frames does not fit"):
        base.play(Transition(frames=9, span=12))


def test_a_span_belongs_to_what_is_learned_and_none_changes_nothing(
    tmp_path: Path, write_noise_pairs: Any
) -> None:
    write_noise_pairs(tmp_path / "pairs", (32, 32), settings='transition = {kind = "discrete"}')
    task = Task.load(tmp_path / "pairs")
    assert "span" not in task.to_dict()["transition"]
    (tmp_path / "pairs" / "task.toml").write_text('transition = {kind = "discrete", span = 29}')
    longer = Task.load(tmp_path / "pairs")
    assert longer.digest() != task.digest()
    assert Task.from_dict(longer.to_dict()).transition == longer.transition

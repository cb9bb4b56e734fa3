"""Acceleration LoRAs under a run's own adapter.

References: diffusers' pipelines with both adapters loaded; W + scale x alpha / rank x B A written
out, under the names that diffusers' converters of whole checkpoints know.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import cogvideox, draw_image, ltx, relative, wan
from torch import Tensor, nn

from fewshot_rt.acceleration import Acceleration, add_acceleration
from fewshot_rt.adapter import EXPERT_FILES
from fewshot_rt.bases import open_base
from fewshot_rt.bases import wan as wan_family
from fewshot_rt.checkpoints import digest_file
from fewshot_rt.cli.export import command as export
from fewshot_rt.cli.predict import command as predict
from fewshot_rt.comfy import comfy_name
from fewshot_rt.errors import ConfigError, ModelError
from fewshot_rt.export.bundle import open_bundle, read_manifest
from fewshot_rt.fit import fit
from fewshot_rt.images import read_image
from fewshot_rt.runs import base_predictor, open_merged, open_run, read_run
from fewshot_rt.train_config import TrainConfig

RANK, ALPHA, SCALE = 4, 2, 0.5  # powers of two: scaling rounds nothing
FAMILIES = {
    "cogvideox": (cogvideox, "1.5", "48x32"),
    "ltx": (ltx, "0.9.5", "32x32"),
    "wan": (wan, "2.2-5B", "32x32"),
    "wan-image": (wan, "2.1", "32x32"),
    "experts": (wan, "2.2-A14B", "32x32"),
}
CONVERTERS = {
    "ltx": single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
    "wan-image": single_file_utils.convert_wan_transformer_to_diffusers,
}
# How files name a layer of low rank: ComfyUI and the models' own code, PEFT, kohya.
STYLES: dict[str, Callable[[str], tuple[str, str, str]]] = {
    "comfy": lambda layer: (f"diffusion_model.{layer}", "lora_down", "lora_up"),
    "peft": lambda layer: (layer, "lora_A.default", "lora_B.default"),
    "kohya": lambda layer: (f"lora_unet__{layer.replace('.', '_')}", "lora_down", "lora_up"),
}


@pytest.fixture(scope="module")
def write_base(tmp_path_factory: pytest.TempPathFactory, make_text_encoder: Any) -> Any:
    """A function that writes the tiny base of a family, once."""

    @functools.cache
    def write(family: str) -> Path:
        maker, version, _ = FAMILIES[family]
        text = make_text_encoder(is_multilingual=True) if maker is wan else make_text_encoder()
        folder: Path = maker.write(tmp_path_factory.mktemp(family) / "base", version, text)
        return folder

    return write


@pytest.fixture(scope="module")
def learn(write_base: Any, write_noise_pairs: Any) -> Any:
    """A function that trains on the tiny base of a family, once, and gives the run."""

    @functools.cache
    def train(family: str) -> Path:
        base: Path = write_base(family)
        size = FAMILIES[family][2]
        width, height = map(int, size.split("x"))
        write_noise_pairs(base.parent / "pairs", (height, width))
        run = base.parent / "runs" / "one"
        config = TrainConfig(base=str(base), size=size, steps=1, batch=1, rank=2, rate=0.02)
        *_, _ = fit(base.parent / "pairs", run, config)
        return run

    return train


def draw(*shape: int, seed: int) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer(predictor: Any) -> Tensor:
    """Answer an image in four steps, which take both experts."""
    image = draw_image(predictor.recipe.size).numpy()
    return torch.from_numpy(predictor.with_recipe(steps=4).answer(image))


@torch.no_grad()
def write_as_diffusers(pipeline: Any, transformer: Any, folder: Path) -> Path:
    """With `save_lora_weights`: random weights for every linear layer of the blocks, and alpha."""
    layers = [name for name, _ in linear_layers(transformer)]
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers))
    named = get_peft_model_state_dict(transformer)
    weights = {name: draw(*value.shape, seed=i) for i, (name, value) in enumerate(named.items())}
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=weights,
        **_collate_lora_metadata({"transformer": transformer}),
    )
    transformer.unload_lora()
    return folder / EXPERT_FILES["transformer."]


def write_as_comfy(pipeline: Any, transformer: Any, folder: Path) -> Path:
    """Under the names of Wan's own code, with an alpha beside each layer."""
    tensors: dict[str, Tensor] = {}
    for seed, (name, module) in enumerate(linear_layers(transformer)):
        layer = f"diffusion_model.{comfy_name(name, wan_family.COMFY_NAMES)}"
        tensors[f"{layer}.lora_down.weight"] = draw(RANK, module.in_features, seed=seed)
        tensors[f"{layer}.lora_up.weight"] = draw(module.out_features, RANK, seed=seed + 500)
        tensors[f"{layer}.alpha"] = torch.tensor(float(ALPHA))
    folder.mkdir()
    save_file(tensors, folder / "comfy.safetensors")
    return folder / "comfy.safetensors"


def linear_layers(transformer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of the blocks, by name."""
    return [
        (name, module)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name
    ]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_diffusers_makes_of_both_adapters(
    learn: Any, tmp_path: Path, family: str
) -> None:
    run = learn(family)
    official: Any = DiffusionPipeline.from_pretrained(run.parents[1] / "base")
    parts = ["transformer", "transformer_2"] if family == "experts" else ["transformer"]
    write = write_as_comfy if family == "wan-image" else write_as_diffusers
    files = [write(official, getattr(official, part), tmp_path / part) for part in parts]
    for part, file in zip(parts, files, strict=True):
        where = {"load_into_transformer_2": True} if part == "transformer_2" else {}
        official.load_lora_weights(file.parent, weight_name=file.name, adapter_name="fast", **where)
        own = EXPERT_FILES[f"{part}."]
        official.load_lora_weights(run, weight_name=own, adapter_name="own", **where)
    official.set_adapters(["fast", "own"], [SCALE, 1.0])

    base: Any = open_base(str(run.parents[1] / "base"))
    holder = base.denoiser().transformer if family == "experts" else base.denoiser()
    for part in parts:
        setattr(holder, part, getattr(official, part))
    recipe = read_run(run)["recipe"]
    expected = answer(base_predictor(base, recipe, base.embed("a mask"), origin=""))

    found = answer(open_run(run, acceleration=[f"{file}:{SCALE}" for file in files]))
    assert relative(found, expected) < 1e-4
    assert relative(answer(open_run(run, acceleration=[*map(str, files)])), expected) > 1e-2
    assert relative(answer(open_run(run)), expected) > 1e-2
    official.set_adapters(["fast", "own"], [SCALE, 0.0])
    without = answer(base_predictor(base, recipe, base.embed("a mask"), origin=""))
    assert relative(without, expected) > 1e-2


def write_everything(transformer: Any, names: Any, style: str, path: Path) -> dict[str, Tensor]:
    """Write an update of every parameter that a file can have; give the updates by their names.

    Matrices are of low rank, all else is whole: convolutions, norms, biases, modulations.
    """
    tensors: dict[str, Tensor] = {}
    updates: dict[str, Tensor] = {}
    for seed, (name, parameter) in enumerate(transformer.named_parameters()):
        theirs = comfy_name(name, names)
        layer, _, kind = theirs.rpartition(".")
        prefix, down_name, up_name = STYLES[style](layer)
        if kind == "weight" and parameter.ndim == 2:
            down = draw(RANK, parameter.shape[1], seed=seed)
            up = draw(parameter.shape[0], RANK, seed=seed + 500)
            tensors[f"{prefix}.{down_name}.weight"] = down
            tensors[f"{prefix}.{up_name}.weight"] = up
            tensors[f"{prefix}.alpha"] = torch.tensor(float(ALPHA))
            updates[theirs] = ALPHA / RANK * (up @ down)
        elif kind in ("weight", "bias", "modulation"):
            end = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[kind]
            updates[theirs] = draw(*parameter.shape, seed=seed)
            tensors[f"{prefix}.{end}"] = updates[theirs]
    save_file(tensors, path)
    return updates


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", CONVERTERS)
def test_every_tensor_counts_under_the_names_of_the_models_own_code(
    write_base: Any, tmp_path: Path, family: str, style: str, weights: str
) -> None:
    base: Any = open_base(str(write_base(family)), weights=weights)
    transformer, path = base.denoiser().transformer, tmp_path / "all.safetensors"
    updates = write_everything(transformer, base.comfy_names, style, path)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    # What diffusers makes of a whole checkpoint under these names.
    update = CONVERTERS[family](updates)
    left = {name for name in before if name not in update}
    assert left == {name for name in before if family == "ltx" and "scale_shift" in name}

    add_acceleration(base, [Acceleration(path, SCALE)])
    for name, value in transformer.state_dict().items():
        expected = before[name].float() + SCALE * update.get(name, 0)
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-6, atol=1e-7)
        assert torch.equal(value, before[name]) == (name in left)


def test_convolutions_of_low_rank_and_their_biases(write_base: Any, tmp_path: Path) -> None:
    """PEFT scales the bias of lora_B as it scales lora_A and lora_B; rslora by the root of rank."""
    base: Any = open_base(str(write_base("wan")))
    layer = base.denoiser().transformer.patch_embedding
    before = layer.weight.clone(), layer.bias.clone()
    up, bias = draw(len(layer.weight), RANK, seed=1), draw(len(layer.weight), seed=2)
    down = draw(RANK, *layer.weight.shape[1:], seed=3)
    tensors = {"A.weight": down, "B.weight": up[:, :, None, None, None], "B.bias": bias}
    path = tmp_path / "convolution.safetensors"
    told = {"transformer.lora_alpha": 1, "transformer.use_rslora": True}
    told["transformer.alpha_pattern"] = {"^patch_embedding": ALPHA}
    save_file(
        {f"transformer.patch_embedding.lora_{end}": value for end, value in tensors.items()},
        path,
        metadata={"lora_adapter_metadata": json.dumps(told)},
    )
    add_acceleration(base, [Acceleration(path)])
    share = ALPHA / RANK**0.5
    update = torch.einsum("or,r...->o...", up, down)
    torch.testing.assert_close(layer.weight, before[0] + share * update)
    torch.testing.assert_close(layer.bias, before[1] + share * bias)


@pytest.mark.slow
def test_a_bundle_answers_as_the_run(learn: Any, write_base: Any, tmp_path: Path) -> None:
    """By the commands, and what the bundle says of the file."""
    run, bundle = learn("ltx"), tmp_path / "bundle"
    base: Any = open_base(str(write_base("ltx")))
    path = tmp_path / "all.safetensors"
    write_everything(base.denoiser().transformer, base.comfy_names, "comfy", path)
    given = ["--accel-lora", f"{path}:{SCALE}"]

    def call(command: Any, *words: Any) -> None:
        done = CliRunner().invoke(command, [*map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        call(export, run, "--engine", "eager", "--out", bundle, *given)
        origin = read_manifest(bundle)["origin"]["acceleration"]
        assert origin == [{"file": path.name, "digest": digest_file(path), "scale": SCALE}]
        expected = answer(open_run(run, acceleration=given[1:]))
        assert relative(answer(open_bundle(bundle)), expected) < 1e-5
        assert relative(answer(open_run(run)), expected) > 1e-2

        images = run.parents[1] / "pairs" / "input"
        for model, out, more in ((run, "a", given), (bundle, "b", []), (run, "c", [])):
            call(predict, images, "--model", model, "--out", out, "--steps", 2, *more)
        one, other, bare = (read_image(Path(out, "0.png")).astype(int) for out in "abc")
        assert np.abs(one - other).max() <= 1
        assert np.abs(one - bare).max() > 10
        with pytest.raises(ConfigError, match="fewshot-rt export"):
            call(predict, images, "--model", bundle, *given)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("lora.safetensors", "lora.safetensors", 1.0),
        ("lora.safetensors:0.5", "lora.safetensors", 0.5),
        (r"C:\lora.safetensors", r"C:\lora.safetensors", 1.0),
        (r"C:\lora.safetensors:2", r"C:\lora.safetensors", 2.0),
        ("at 12:30/lora.safetensors:1e-1", "at 12:30/lora.safetensors", 0.1),
    ],
)
def test_a_scale_is_a_number_behind_the_last_colon(
    monkeypatch: pytest.MonkeyPatch, text: str, path: str, scale: float
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    assert Acceleration.parse(text) == Acceleration(Path(path), scale)


@pytest.mark.parametrize("text", ["lora.safetensors", "lora.safetensors:strong", "lora:", "."])
def test_a_missing_file_is_told_before_the_base_is_read(
    learn: Any, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("fewshot_rt.bases.open_base", None)
    with pytest.raises(ModelError, match=r"no file .* as FILE or FILE:SCALE"):
        open_merged(learn("ltx"), acceleration=[text])


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_an_impossible_scale_is_refused(tmp_path: Path, scale: str) -> None:
    with pytest.raises(ConfigError, match=f"above 0, not {scale}"):
        Acceleration.parse(f"{tmp_path / 'lora.safetensors'}:{scale}")


LAYER = "diffusion_model.transformer_blocks.0.attn1.to_q"
PAIR = {f"{LAYER}.lora_A.weight": torch.ones(1, 16), f"{LAYER}.lora_B.weight": torch.ones(16, 1)}
UNFIT: dict[str, tuple[dict[str, Tensor], int]] = {
    "another model": ({f"unet.{name}": value for name, value in PAIR.items()}, 2),
    "a block too many": ({n.replace(".0.", ".9."): v for n, v in PAIR.items()}, 2),
    "another width": ({name: value.repeat(1, 2) for name, value in PAIR.items()}, 2),
    "a norm of low rank": ({n.replace("to_q", "norm_q"): v for n, v in PAIR.items()}, 2),
    "no matrices": ({name: torch.tensor(1.0) for name in PAIR}, 2),
    "half a pair": ({f"{LAYER}.lora_B.weight": torch.ones(16, 16)}, 1),
    "another half": ({f"{LAYER}.lora_A.weight": torch.ones(1, 16)}, 1),
    "an alpha alone": ({f"{LAYER}.alpha": torch.tensor(1.0)}, 1),
    "DoRA": ({**PAIR, f"{LAYER}.dora_scale": torch.ones(16)}, 1),
    "a norm that is none": ({**PAIR, "diffusion_model.norm.diff": torch.ones(16)}, 1),
    "a short bias": ({**PAIR, f"{LAYER}.diff_b": torch.ones(8)}, 1),
    "twice the same": ({**PAIR, f"{LAYER}.lora_up.weight": torch.ones(16, 1)}, 1),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_file_that_does_not_fit_whole_is_refused(
    write_base: Any, tmp_path: Path, name: str
) -> None:
    base: Any = open_base(str(write_base("ltx")))
    before = {n: value.clone() for n, value in base.denoiser().state_dict().items()}
    tensors, count = UNFIT[name]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match=f"of its {len(tensors)} tensors, {count} have no layer"):
        add_acceleration(base, [Acceleration(tmp_path / "lora.safetensors")])
    for n, value in base.denoiser().state_dict().items():
        assert torch.equal(value, before[n])


@pytest.mark.parametrize("times", [0, 1e-12])
def test_a_file_that_changes_nothing_is_refused(
    write_base: Any, tmp_path: Path, times: float
) -> None:
    base = open_base(str(write_base("ltx")), weights="bf16")
    save_file({n: times * value for n, value in PAIR.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="changes nothing: at scale 1 "):
        add_acceleration(base, [Acceleration(tmp_path / "lora.safetensors")])
    save_file({}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="changes nothing"):
        add_acceleration(base, [Acceleration(tmp_path / "lora.safetensors")])


@pytest.mark.parametrize("metadata", [None, "{", "3"])
def test_a_damaged_file_is_refused(write_base: Any, tmp_path: Path, metadata: str | None) -> None:
    path = tmp_path / "lora.safetensors"
    if metadata is None:
        path.write_bytes(b"no tensors")
    else:
        save_file(PAIR, path, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(ModelError, match=r"cannot be read .* download it again"):
        add_acceleration(open_base(str(write_base("ltx"))), [Acceleration(path)])


@pytest.mark.parametrize(("family", "given"), [("experts", 1), ("experts", 3), ("ltx", 2)])
def test_there_is_one_file_for_each_transformer(
    write_base: Any, tmp_path: Path, family: str, given: int
) -> None:
    with pytest.raises(
        ConfigError, match=f"transformer.*{given} acceleration.*noisier times first"
    ):
        add_acceleration(open_base(str(write_base(family))), [Acceleration(tmp_path)] * given)


def test_none_fits_pocket(tiny_base: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no acceleration LoRA fits tiny"):
        add_acceleration(tiny_base, [Acceleration(tmp_path)])

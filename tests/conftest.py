"""What many tests share: a tiny base with random weights, in memory and on disk."""

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TINY_SIZE = (32, 32)
_FLAGS = ["--base", "base", "--batch", "2", "--variants", "2", "--rank", "4"]
TINY_TRANSFORMER = {
    "num_layers": 1,
    "num_attention_heads": 1,
    "ffn_dim": 64,
    "in_channels": 24,  # two frames of 8, and 8 waves
    "out_channels": 8,
}


def pytest_collection_finish() -> None:
    """Spare all tests two efforts that tell them nothing.

    Garbage is not looked for among the million objects that imports made; training asks for it at
    every run. Tracing does not note where in the source a node is from: that takes a quarter of the
    time of an export. `test_program.py` lets it.
    """
    gc.collect()
    gc.freeze()
    if "torch" in sys.modules:
        sys.modules["torch"].fx.config.do_not_emit_stack_traces = True


@pytest.fixture(scope="session")
def make_tiny_base() -> Callable[[], Any]:
    """A function that makes a PocketBase, always the same: a few layers, random weights, 32x32."""
    import torch
    from diffusers import WanTransformer3DModel

    from fewshot_rt.autoencoder import AutoencoderConfig, TinyVideoAutoencoder
    from fewshot_rt.bases.pocket import TRANSFORMER, PocketBase, PromptTable

    def make(layers: int = 1) -> PocketBase:
        sizes = TINY_TRANSFORMER | {"num_layers": layers}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return PocketBase(
                transformer=WanTransformer3DModel.from_config(TRANSFORMER | sizes),
                autoencoder=TinyVideoAutoencoder(
                    AutoencoderConfig(latent_channels=8, widths=(8, 8, 8), blocks=(0, 1, 1))
                ),
                prompts=PromptTable(("", "mask"), torch.randn(2, TRANSFORMER["text_dim"])),
                index={"name": "tiny", "revision": "0", "native": list(TINY_SIZE)},
            )

    return make


@pytest.fixture
def tiny_base(make_tiny_base: Callable[[], Any]) -> Any:
    """A tiny base of one's own, to do with as one likes."""
    return make_tiny_base()


@pytest.fixture(scope="session")
def write_tiny_base(make_tiny_base: Callable[[], Any]) -> Callable[[Path], Path]:
    """A function that writes the tiny base as `pretrain` would, but in fp32."""
    return lambda folder: _write_base(make_tiny_base(), folder)


@pytest.fixture
def tiny_base_folder(write_tiny_base: Callable[[Path], Path], tmp_path: Path) -> Path:
    """The tiny base on disk, for `open_base(str(folder))`."""
    return write_tiny_base(tmp_path / "tiny_base")


def _write_pairs(folder: Path) -> None:
    """Bright squares and their masks: 3 pairs to train, 2 to test."""
    from fewshot_rt.images import write_image

    for index in range(5):
        split = "test" if index > 2 else "train"
        mask = np.zeros((32, 32), np.uint8)
        mask[4 + index : 20, 6 : 22 + index] = 255
        image = np.repeat((mask // 2 + 40)[..., None], 3, axis=-1)
        write_image(folder / split / "input" / f"{index}.png", image)
        write_image(folder / split / "target" / f"{index}.png", mask)


def _type(*words: Any) -> int:
    """Type a command; give its status."""
    from fewshot_rt.cli.main import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fewshot-rt", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
    return int(left.value.code or 0)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, write_tiny_base: Any) -> Path:
    """A folder with a base, pairs, and a short training named "one" with its ONNX bundle."""
    folder = tmp_path_factory.mktemp("workshop")
    write_tiny_base(folder / "base")
    _write_pairs(folder / "pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert _type("train", "pairs", "--name", "one", "--steps", 3, *_FLAGS) == 0
        assert _type("export", "--engine", "onnx") == 0
    return folder


@pytest.fixture(scope="session")
def make_text_encoder() -> Callable[..., dict[str, Any]]:
    """A function that makes a T5 text encoder of two words with its tokenizer, for a pipeline."""

    def make(*, width: int = 16, is_multilingual: bool = False) -> dict[str, Any]:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import (
            PreTrainedTokenizerFast,
            T5Config,
            T5EncoderModel,
            UMT5Config,
            UMT5EncoderModel,
        )

        words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "mask": 3}, "<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        sizes = {"vocab_size": 4, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1}
        sizes["num_heads"] = 2
        encoder = (
            UMT5EncoderModel(UMT5Config(**sizes))
            if is_multilingual
            else T5EncoderModel(T5Config(**sizes))
        )
        return {
            "tokenizer": PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
            ),
            "text_encoder": encoder,
        }

    return make


@pytest.fixture(scope="session")
def write_noise_pairs() -> Callable[..., None]:
    """A function that writes two pairs of noise with a prompt, and a transition if one is given."""

    def write(folder: Path, size: tuple[int, int], *, settings: str = "") -> None:
        from fewshot_rt.images import write_image

        rng = np.random.default_rng(0)
        for side in ("input", "target"):
            for number in range(2):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                write_image(folder / side / f"{number}.png", pixels)
        (folder / "task.toml").write_text(f'prompt = "a mask"\n{settings}')

    return write


@pytest.fixture(scope="session")
def freeze() -> Callable[[Path, Path], Any]:
    """A function that exports a run for ONNX Runtime and opens the bundle."""

    def export(run: Path, folder: Path) -> Any:
        from fewshot_rt.export.build import export_bundle
        from fewshot_rt.export.bundle import open_bundle
        from fewshot_rt.runs import open_merged

        merged, _, values = open_merged(run)
        *_, written = export_bundle(
            merged,
            recipe=values["recipe"],
            prompt=values["prompt"],
            engine="onnx",
            precision="fp32",
            folder=folder,
            origin={},
        )
        assert written.stage == "write"
        return open_bundle(folder)

    return export


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, workshop: Path) -> Any:
    """Type commands in a folder with a base and pairs; give status, stdout and stderr."""
    for name in ("base", "pairs"):
        shutil.copytree(workshop / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def typed(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        status = _type(*words)
        return status, *capsys.readouterr()

    return typed


@pytest.fixture
def exported(run: Any, workshop: Path) -> Any:
    """The same, with the run and its bundle."""
    shutil.copytree(workshop / "runs", "runs", symlinks=True)
    return run


@pytest.fixture
def trained(exported: Any) -> Any:
    """The same, with the run alone."""
    shutil.rmtree("runs/one/bundles")
    return exported


def _write_base(tiny_base: Any, folder: Path) -> Path:
    from safetensors.torch import save_file

    from fewshot_rt.bases.pocket import WEIGHT_FILE
    from fewshot_rt.files import write_json

    transformer = tiny_base.denoiser().transformer
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    write_json(
        folder / "model_index.json",
        {
            "name": tiny_base.name,
            "revision": tiny_base.revision,
            "native": list(TINY_SIZE),
            "licence": "Apache-2.0",
        },
    )
    write_json(
        folder / "transformer" / "config.json", {"_class_name": "WanTransformer3DModel"} | config
    )
    write_json(folder / "vae" / "config.json", tiny_base.autoencoder.config.to_dict())
    write_json(folder / "prompt" / "words.json", list(tiny_base.prompts.words))
    (folder / "prompt").mkdir(exist_ok=True)
    save_file(transformer.state_dict(), folder / "transformer" / WEIGHT_FILE)
    save_file(tiny_base.autoencoder.state_dict(), folder / "vae" / WEIGHT_FILE)
    save_file(
        {"embeddings": tiny_base.prompts.embeddings}, folder / "prompt" / "embeddings.safetensors"
    )
    return folder

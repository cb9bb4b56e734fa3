"""Training in little memory: weights of few bits, activations computed twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny.ltx import write
from torch import Tensor

from fewshot_rt.errors import ModelError
from fewshot_rt.fit import fit
from fewshot_rt.runs import _open, open_merged
from fewshot_rt.train_config import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_text_encoder: Any) -> Path:
    return write(tmp_path_factory.mktemp("lean") / "ltx", "0.9.5", make_text_encoder(), head=32)


def learn(folder: Path, place: Path, **options: Any) -> dict[str, Tensor]:
    """Train for two steps and give the adapter's weights."""
    given: dict[str, Any] = {"size": "32x32", "steps": 2, "batch": 1, "rank": 2, "rate": 0.02}
    *_, _ = fit(
        place / "pairs",
        place / "runs" / "one",
        TrainConfig(base=str(folder), hold_out=0, **given | options),
        overwrite=True,
    )
    return load_file(place / "runs" / "one" / "adapter" / "adapter_model.safetensors")


def test_activations_that_are_computed_twice_change_nothing(
    folder: Path, tmp_path: Path, write_noise_pairs: Any
) -> None:
    write_noise_pairs(tmp_path / "pairs", (32, 32))
    kept, twice = (
        learn(folder, tmp_path, checkpointing=chosen, precision="fp32") for chosen in (False, True)
    )
    torch.testing.assert_close(twice, kept)


def test_too_little_memory_is_told_with_what_saves_some(
    folder: Path, tmp_path: Path, write_noise_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    write_noise_pairs(tmp_path / "pairs", (32, 32))
    monkeypatch.setattr("fewshot_rt.train.choose_loss", lambda *_: exhaust)
    with pytest.raises(ModelError, match=r"allocate 2.00 GiB.\).*--weights nf4"):
        learn(folder, tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
def test_adapters_are_trained_on_weights_of_few_bits(
    folder: Path, tmp_path: Path, write_noise_pairs: Any, weights: str
) -> None:
    write_noise_pairs(tmp_path / "pairs", (32, 32))
    learned = learn(folder, tmp_path, weights=weights)
    assert {value.dtype for value in learned.values()} == {torch.float32}
    assert all(value.abs().max() > 0 for value in learned.values())
    # Answers come from the base as it is, or in bf16 if that was asked for.
    run = tmp_path / "runs" / "one"
    base, *_ = _open(run, device="cpu", weights=None)
    kinds = {p.dtype for p in base.denoiser().parameters()}
    assert kinds == {torch.bfloat16 if weights == "bf16" else torch.float32}
    # What is built of a run is in fp32.
    merged, *_ = open_merged(run)
    assert {p.dtype for p in merged.denoiser().parameters()} == {torch.float32}

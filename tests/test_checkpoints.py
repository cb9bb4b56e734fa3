"""Folders from the Hub: a cache laid out as huggingface_hub has it, and what goes wrong without."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewshot_rt import checkpoints
from fewshot_rt.bases import open_base
from fewshot_rt.checkpoints import digest_folder, find_snapshot, read_pipeline
from fewshot_rt.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_what_is_in_the_cache_is_found_without_a_network(
    cache: Path, write_tiny_base: Callable[[Path], Path]
) -> None:
    place = cache / "models--someone--tiny"
    write_tiny_base(place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    for name in ("someone/tiny", "someone/tiny@main", f"someone/tiny@{COMMIT}"):
        assert find_snapshot(name) == place / "snapshots" / COMMIT
    base: Any = open_base("someone/tiny")
    assert base.name == "someone/tiny"
    assert base.geometry.native == (32, 32)


def test_what_is_not_there_says_what_to_do(cache: Path) -> None:
    with pytest.raises(ModelError, match="hf download someone/other"):
        open_base("someone/other")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("GatedRepoError", "accept its licence"),
        ("RepositoryNotFoundError", "name"),
        ("RevisionNotFoundError", "leave out @v2"),
    ],
)
def test_what_may_not_be_read_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: str, hint: str
) -> None:
    """The Hub's answers cannot be had here: its client's own errors stand for them."""
    from huggingface_hub import errors

    def refuse(*_: Any, **__: Any) -> str:
        response = SimpleNamespace(headers={}, request=None, status_code=401)
        raise getattr(errors, error)("no", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match=hint):
        checkpoints.find_snapshot("someone/gated@v2")


def test_the_pipeline_is_read_from_the_index(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline"}))
    assert read_pipeline(tmp_path) == "SomePipeline"
    (tmp_path / "model_index.json").write_text("{}")
    assert read_pipeline(tmp_path) is None


def test_the_digest_follows_configurations_and_weights(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    part = tmp_path / "transformer"
    config, weights = part / "config.json", part / "w.safetensors"
    config.write_text("{}")
    index = {"_class_name": "SomePipeline", "transformer": ["diffusers", "Some"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    weights.write_bytes(b"1234")
    first = digest_folder(tmp_path)
    for other in ("README.md", "all-in-one.safetensors", "other.json"):
        (tmp_path / other).write_text("words")
    assert digest_folder(tmp_path) == first
    seen = {first}
    for path, content in ((config, b"{ }"), (weights, b"12345"), (weights, b"12346")):
        path.write_bytes(content)
        seen.add(digest_folder(tmp_path))
    assert len(seen) == 4

"""A bundle: a folder that predicts, without diffusers, peft, transformers, or what trained it.

It holds one engine's file of each role, the embedded prompt, and a manifest that says what they
are, where they came from, how close they are to eager, and what every file must hash to.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewshot_rt.errors import ConfigError, ModelError
from fewshot_rt.files import reported, write_json
from fewshot_rt.predictor import Predictor, Recipe
from fewshot_rt.spec import ROLES, Signature
from fewshot_rt.versions import versions

from .adapters import Adapters, Held, read_prompt, write_prompt, write_updates
from .engine import AGAIN, require_engine
from .parity import Parity
from .quality import Quality, quality_values

if TYPE_CHECKING:
    from .live import Update

FORMAT = 1
MANIFEST, PROMPT = "manifest.json", "prompt.safetensors"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a manifest says beside the files themselves.

    files: the file of each role, by its name in the folder. parity: by role, then by tensor; the
    role "answer" is the whole way. quality: by the task's metric, if it was judged. origin: base,
    revision, licence and whatever else is known of where the weights came from, as JSON values.
    """

    engine: str
    precision: str
    recipe: Recipe
    signatures: Mapping[str, Signature]
    files: Mapping[str, str]
    prompt: Mapping[str, np.ndarray]
    parity: Mapping[str, Mapping[str, Parity]]
    quality: Quality | None = None
    origin: Mapping[str, Any]


@contextmanager
def staged_bundle(folder: Path) -> Iterator[Path]:
    """Lend a temporary folder that takes the place of a bundle if the block ends without an error.

    An older bundle stays until then, and nothing is left behind after an error.
    Raises: ConfigError if something else than a bundle is there; DataError if the disk is full or
    the place cannot be written to.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and not _is_empty(folder):
        raise ConfigError(
            f"{folder} is there and is not a bundle; it is not replaced. Choose another folder."
        )
    staging = folder.with_name(f".part-{folder.name}-{os.getpid()}")
    with reported(folder):
        try:
            staging.mkdir(parents=True)
            yield staging
            _replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_bundle(
    staging: Path, contents: Contents, held: "Mapping[str, Mapping[str, Update]] | None" = None
) -> None:
    """Complete a staged folder, in which the files of the roles are, with prompt and manifest.

    held: adapters by name that are kept beside the base's weights; recipe and prompt of the
    contents are those of the one.
    Raises: DataError if the disk is full.
    """
    write_prompt(staging / PROMPT, contents.prompt)
    adapters = {}
    for name, updates in (held or {}).items():
        names = ("recipe", "parity", "quality", "origin")
        said = {name: getattr(contents, name) for name in names}
        adapters[name] = write_held(staging, name, updates, contents.prompt, **said)
    files = {path.name: fingerprint(path) for path in sorted(staging.iterdir())}
    roles = {
        role: {"file": contents.files[role], "signature": contents.signatures[role].to_dict()}
        for role in ROLES
    }
    manifest = {
        "format": FORMAT,
        "engine": contents.engine,
        "precision": contents.precision,
        "origin": dict(contents.origin),
        "recipe": contents.recipe.to_dict(),
        "roles": roles,
        "files": files,
        "parity": parity_values(contents.parity),
        **quality_values(contents.quality),
        "adapters": adapters,
        "versions": versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(staging / MANIFEST, manifest)


def write_held(
    folder: Path,
    name: str,
    updates: "Mapping[str, Update]",
    prompt: Mapping[str, np.ndarray],
    **said: Any,
) -> dict[str, Any]:
    """Write an adapter and its prompt into a bundle's folder; give what the manifest says of it.

    said: recipe, parity, quality and origin, as `Contents` has them.
    Raises: ConfigError if the name is no plain name.
    """
    require_name(name)
    file, prompt_file = f"adapter-{name}.safetensors", f"prompt-{name}.safetensors"
    write_updates(folder / file, updates)
    write_prompt(folder / prompt_file, prompt)
    return {
        "file": file,
        "prompt": prompt_file,
        "recipe": said["recipe"].to_dict(),
        "parity": parity_values(said["parity"]),
        **quality_values(said["quality"]),
        "origin": dict(said["origin"]),
    }


def require_name(name: str) -> None:
    """Require that an adapter's name can be a file's. Raises: ConfigError."""
    if Path(name).name != name or name.startswith("."):
        raise ConfigError(f"an adapter's name must be one plain name, not {name!r}.")


def add_held(
    folder: Path,
    name: str,
    updates: "Mapping[str, Update]",
    prompt: Mapping[str, np.ndarray],
    **said: Any,
) -> None:
    """Add an adapter to a bundle that is there; its manifest changes last. said: see `write_held`.

    Raises: ConfigError if the name is no plain name; DataError if the disk is full.
    """
    manifest = read_manifest(folder)
    with reported(folder):
        entry = write_held(folder, name, updates, prompt, **said)
        for file in (entry["file"], entry["prompt"]):
            manifest["files"][file] = fingerprint(folder / file)
        manifest["adapters"][name] = entry
        write_json(folder / MANIFEST, manifest)


def parity_values(parity: Mapping[str, Mapping[str, Parity]]) -> dict[str, dict[str, Any]]:
    """Give figures of parity as JSON values."""
    return {
        role: {name: figures.to_dict() for name, figures in group.items()}
        for role, group in parity.items()
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a bundle is, without opening it.

    Raises: ModelError if there is none, or it is damaged or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(f"{folder} is not a bundle: it has no {MANIFEST}. {AGAIN}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}). {AGAIN}") from error
    if version != FORMAT:
        raise ModelError(
            f"{folder} has bundle format {version}, and this fewshot-rt reads {FORMAT}. {AGAIN}"
        )
    return dict(manifest)


def read_recipe(folder: Path) -> Recipe:
    """Read how a bundle answers, without opening it.

    Raises: ModelError if there is none, or it is damaged or of another format.
    """
    try:
        return Recipe.from_dict(read_manifest(folder)["recipe"])
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise ModelError(f"{folder / MANIFEST} is damaged ({error!r}). {AGAIN}") from error


def open_bundle(
    path: Path, *, device: str = "cpu", threads: int | None = None, hint: str | None = None
) -> Predictor:
    """Open a bundle as a predictor, after checking every file of it.

    threads: of one call; None leaves it to the engine. hint: what the engine favours, one of its
    `hints`.
    Raises: ModelError if it is missing or damaged; EngineError if its engine or the device is not
    there; ConfigError if the engine takes no such hint.
    """
    manifest = read_manifest(path)
    try:
        recipe = Recipe.from_dict(manifest["recipe"])
        files = {role: str(manifest["roles"][role]["file"]) for role in ROLES}
        signatures = {
            role: Signature.from_dict(manifest["roles"][role]["signature"]) for role in ROLES
        }
        engine_name, precision = str(manifest["engine"]), str(manifest["precision"])
        held = {name: Held.from_dict(v) for name, v in manifest.get("adapters", {}).items()}
        own = {file for one in held.values() for file in (one.file, one.prompt)}
        _check_files(path, manifest["files"], needed={*files.values(), PROMPT, *own})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ConfigError) as error:
        raise ModelError(f"{path / MANIFEST} is damaged ({error!r}). {AGAIN}") from error
    engine = require_engine(engine_name)
    options: dict[str, Any] = {"device": device, "threads": threads}
    if hint is not None:
        if hint not in engine.hints:
            raise ConfigError(
                f"{path} is for engine {engine_name!r}, which takes no hint {hint!r}. Leave it "
                "out, or export for 'openvino'."
            )
        options["hint"] = hint
    runners = {role: engine.load(path / files[role], signatures[role], **options) for role in ROLES}
    origin = f"{recipe.task} {engine_name}-{precision}"
    prompt = read_prompt(path / PROMPT)
    if not held:
        return Predictor(runners, prompt=prompt, recipe=recipe, origin=origin)
    adapters = Adapters(path, held, runners["denoiser"])
    predictor = Predictor(runners, prompt=prompt, recipe=recipe, origin=origin, adapters=adapters)
    predictor.use(next(iter(held)))
    return predictor


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, needed: set[str]) -> None:
    for name in sorted(needed | set(files)):
        path, expected = folder / name, files[name]
        if path.parent != folder:
            raise ModelError(f"{folder / MANIFEST} names a file outside: {name!r}. {AGAIN}")
        if not path.is_file():
            raise ModelError(f"the bundle in {folder} lacks {name}. {AGAIN}")
        size = path.stat().st_size
        if size != expected["size_bytes"]:
            raise ModelError(
                f"{path} is damaged: it has {size} bytes and should have {expected['size_bytes']}. "
                f"{AGAIN}"
            )
        if fingerprint(path)["sha256"] != expected["sha256"]:
            raise ModelError(f"{path} is damaged: its contents changed after export. {AGAIN}")


def fingerprint(path: Path) -> dict[str, Any]:
    """Give size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"size_bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _replace(staging: Path, folder: Path) -> None:
    """Put the new bundle in place; the older one comes back if that fails."""
    if not folder.exists():
        os.rename(staging, folder)
        return
    older = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    os.rename(folder, older)
    try:
        os.rename(staging, folder)
    except OSError:
        os.rename(older, folder)
        raise
    shutil.rmtree(older, ignore_errors=True)

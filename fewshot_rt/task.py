"""A task: pairs, a fixed prompt, a transition, a codec and metrics. A folder and no Python."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from .codecs import Codec, infer_codec
from .config import read_mapping
from .errors import ConfigError, DataError, unknown
from .images import Pixels, read_image
from .metrics import check_metrics, default_metrics
from .pairs import SPLITS, Pair, Problem, find_pairs, inspect_pairs
from .transition import Transition

__all__ = ["Pair", "Problem", "Task", "lint", "load_pair"]

SETTINGS_FILE = "task.toml"
KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "prompt": (str,),
    "transition": (str, dict),
    "codec": (str, dict),
    "metrics": (list,),
}
TRANSITION_KEYS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "frames": (int,),
    "seed": (int,),
    "span": (int,),
}
CODEC_KEYS: dict[str, tuple[type, ...]] = {"name": (str,), "colours": (list,)}
MOST_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learned, as data.

    name: for people. prompt: the fixed text for the video model. transition: how a pair becomes a
    video; unless the task states it, a base plays its own (`played`). codec: what targets mean.
    metrics: names, the one to judge by first. pairs: sorted by name as loaded, in the order of the
    draw after `shots`.
    """

    name: str
    prompt: str
    transition: Transition
    states_transition: bool = False
    codec: Codec
    metrics: tuple[str, ...]
    pairs: tuple[Pair, ...]

    @classmethod
    def load(cls, folder: Path) -> "Task":
        """Load a folder of pairs, with `task.toml` if there is one. Every image is read.

        Without a codec in `task.toml`, it is inferred from the targets for training.
        Raises: DataError with all errors of the pairs; ConfigError if `task.toml` does not fit.
        """
        settings = _settings(folder)
        pairs, problems = find_pairs(folder)
        _require_none(folder, [*problems, *inspect_pairs(pairs)])
        return _assembled(folder, settings, tuple(pairs))

    def split(self, name: str) -> "Task":
        """Give the task with the pairs of one split, "train" or "test"; there may be none.

        Raises: ConfigError if there is no such split.
        """
        if name not in SPLITS:
            raise ConfigError(unknown("split", name, SPLITS))
        return replace(self, pairs=tuple(pair for pair in self.pairs if pair.split == name))

    def shots(self, count: int, seed: int) -> "Task":
        """Give the task with a few pairs for training, drawn by a seed.

        Draws are nested: with one seed, the pairs of a smaller count begin those of a larger one.
        Raises: DataError if the count is below 1 or above the number of pairs for training.
        """
        train = self.split("train").pairs
        if not 1 <= count <= len(train):
            raise DataError(
                f"{count} shots were asked for, but task {self.name!r} has {len(train)} pairs "
                "for training. Ask for 1 up to that many, or add pairs."
            )
        order = np.random.default_rng(seed).permutation(len(train))
        return replace(self, pairs=tuple(train[i] for i in order[:count]))

    def played(self, transition: Transition) -> "Task":
        """Give the task with a base's own transition, unless it states one."""
        return self if self.states_transition else replace(self, transition=transition)

    def load_pairs(self) -> Iterator[tuple[Pixels, Pixels]]:
        """Read the pairs one by one, as the video shows them.

        Shapes: inputs and painted targets, uint8 [H, W, 3].
        Raises: DataError if a file cannot be read.
        """
        return (load_pair(pair, self.codec) for pair in self.pairs)

    def digest(self) -> str:
        """Give 16 hexadecimal digits over what is learned from.

        These are the bytes of all files, the splits, transition, codec and prompt; neither names
        and places of files nor the order of pairs matter.
        """
        files = sorted(
            (p.split, _file_digest(p.source), _file_digest(p.target)) for p in self.pairs
        )
        content = [files, self.transition.to_dict(), self.codec.to_dict(), self.prompt]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values, with absolute paths."""
        return {
            "name": self.name,
            "prompt": self.prompt,
            "transition": self.transition.to_dict(),
            "states_transition": self.states_transition,
            "codec": self.codec.to_dict(),
            "metrics": list(self.metrics),
            "pairs": [
                {
                    "name": pair.name,
                    "input": str(pair.source.resolve()),
                    "target": str(pair.target.resolve()),
                    "split": pair.split,
                }
                for pair in self.pairs
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Task":
        """Make a task from what `to_dict` gave; the files need not be there.

        Raises: DataError if something is missing.
        """
        try:
            pairs = tuple(
                Pair(p["name"], Path(p["input"]), Path(p["target"]), p["split"])
                for p in values["pairs"]
            )
            return cls(
                name=values["name"],
                prompt=values["prompt"],
                transition=_transition(values["transition"]),
                states_transition=values.get("states_transition", True),
                codec=Codec.from_dict(values["codec"]),
                metrics=check_metrics(values["metrics"], values["codec"]["name"]),
                pairs=pairs,
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"the task is damaged: {error!r}. Load it from its folder.") from error


def load_pair(pair: Pair, codec: Codec) -> tuple[Pixels, Pixels]:
    """Read a pair as the video shows it.

    Shapes: input and painted target, uint8 [H, W, 3].
    Raises: DataError if a file cannot be read.
    """
    return read_image(pair.source), codec.paint(read_image(pair.target))


def lint(folder: Path) -> list[Problem]:
    """List all that is wrong with a folder of pairs, errors first; nothing is raised."""
    pairs, problems = find_pairs(folder)
    problems += inspect_pairs(pairs)
    if sum(pair.split == "train" for pair in pairs) == 1:
        message = f"{folder} has only one pair for training. Three to thirty work better."
        problems.append(Problem("few", message, "warning"))
    if not any(problem.severity == "error" for problem in problems):
        try:
            _assembled(folder, _settings(folder), tuple(pairs))
        except (ConfigError, DataError) as error:
            problems.append(Problem("config", str(error)))
    return sorted(problems, key=lambda problem: problem.severity)


def _require_none(folder: Path, problems: Iterable[Problem]) -> None:
    errors = [problem.message for problem in problems if problem.severity == "error"]
    if errors:
        more = [f"and {len(errors) - MOST_LISTED} more"] if len(errors) > MOST_LISTED else []
        listed = "".join(f"\n- {line}" for line in [*errors[:MOST_LISTED], *more])
        raise DataError(f"{folder} cannot be used:{listed}")


def _settings(folder: Path) -> dict[str, Any]:
    """Read `task.toml`, if there is one, and check its keys and their types."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    values = read_mapping(path)
    _check_keys(values, KEYS, where=str(path))
    return values


def _assembled(folder: Path, settings: Mapping[str, Any], pairs: tuple[Pair, ...]) -> Task:
    """Make a task from sound pairs and what `task.toml` says."""
    codec = _codec(settings.get("codec", {}), pairs)
    metrics = settings.get("metrics", default_metrics(codec.name))
    return Task(
        name=settings.get("name", folder.resolve().name),
        prompt=settings.get("prompt", ""),
        transition=_transition(settings.get("transition", {})),
        states_transition="transition" in settings,
        codec=codec,
        metrics=check_metrics(metrics, codec.name),
        pairs=pairs,
    )


def _check_keys(
    values: Mapping[str, Any], possible: Mapping[str, tuple[type, ...]], *, where: str
) -> None:
    for key, value in values.items():
        if key not in possible:
            raise ConfigError(f"{where}: {unknown('key', key, possible)}")
        if not isinstance(value, possible[key]) or isinstance(value, bool):
            types = {str: "text", dict: "a table", list: "a list", int: "a whole number"}
            needed = " or ".join(types[kind] for kind in possible[key])
            raise ConfigError(f"{where}: {key} must be {needed}, not {value!r}.")


def _transition(value: str | Mapping[str, Any]) -> Transition:
    """Make a transition from its kind or from a table."""
    if isinstance(value, str):
        return Transition(kind=value)
    _check_keys(value, TRANSITION_KEYS, where="transition")
    return Transition(**value)


def _codec(value: str | Mapping[str, Any], pairs: tuple[Pair, ...]) -> Codec:
    """Make a codec from a table, or find it or its colours out from the targets for training."""
    table = {"name": value} if isinstance(value, str) else value
    _check_keys(table, CODEC_KEYS, where="codec")
    if "colours" in table:
        return Codec.from_dict(table)
    train = [pair for pair in pairs if pair.split == "train"] or pairs
    return infer_codec((read_image(pair.target) for pair in train), name=table.get("name"))


def _file_digest(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}).") from error

"""Options that commands share: `--json`, flags generated from settings, and where models are."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from fewshot_rt.config import OptionInfo, make, options, read_mapping

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

FOLDER = click.Path(path_type=Path)
RUNS = Path("runs")


class Steps(click.ParamType[int | None]):
    """Denoising steps: a whole number, or auto, which is None."""

    name = "auto|integer"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        """Read the number; wrong usage if it is none or below 1."""
        if value == "auto":
            return None
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither auto nor a number from 1 on", param, ctx)
        return int(value)


def json_option(function: F) -> F:
    """Add `--json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="End stdout with one JSON document."
    )(function)


def runs_option(function: F) -> F:
    """Add `--runs`: where run folders lie."""
    return click.option(
        "--runs", type=FOLDER, default=RUNS, show_default=True, help="Folder of the runs."
    )(function)


def steps_option(function: F) -> F:
    """Add `--steps`: of denoising."""
    return click.option(
        "--steps",
        type=Steps(),
        default="auto",
        show_default=True,
        help="Denoising steps; auto takes as few as the training found enough.",
    )(function)


def acceleration_option(function: F) -> F:
    """Add `--accel-lora`: published LoRAs that let a base do with few steps."""
    return click.option(
        "--accel-lora",
        "acceleration",
        multiple=True,
        metavar="FILE[:SCALE]",
        help="A published LoRA for few steps, added to the base under the run's own adapter; "
        "predict with the --steps that it is made for. For a base of two transformers give two, "
        "that for the noisier times first.",
    )(function)


def settings_options(cls: type, *, leave_out: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Add one flag for each field of a settings class, and `--config` for a file of them.

    A flag that is not given stays None, so that the file, then the default, can speak.
    """

    def decorate(function: F) -> F:
        for info in reversed(options(cls)):
            if info.name not in leave_out:
                function = _flag(info)(function)
        return click.option(
            "--config", type=FOLDER, help="Settings from a TOML or JSON file; flags come first."
        )(function)

    return decorate


def make_settings(cls: type[T], config: Path | None, flags: Mapping[str, Any]) -> T:
    """Make settings from a file and from the flags that were given.

    Raises: ConfigError for an unknown key, a wrong type or value.
    """
    values = read_mapping(config) if config else {}
    return make(cls, values | {name: flag for name, flag in flags.items() if flag is not None})


def write_result(values: Mapping[str, Any], *, as_json: bool) -> None:
    """Write the one JSON document, if it is asked for."""
    if as_json:
        click.echo(json.dumps(_without_nan(values), default=str, allow_nan=False))


def _without_nan(values: Any) -> Any:
    """Put null where a number is none: JSON has no NaN."""
    if isinstance(values, Mapping):
        return {name: _without_nan(value) for name, value in values.items()}
    return None if isinstance(values, float) and values != values else values


def _flag(info: OptionInfo) -> Callable[[F], F]:
    name = info.name.replace("_", "-")
    shown = "" if info.default is None else f"  [default: {_shown(info.default)}]"
    if info.type is bool:
        return click.option(f"--{name}/--no-{name}", default=None, help=info.help + shown)
    kind: Any = click.Choice(info.choices) if info.choices else info.type
    return click.option(f"--{name}", type=kind, default=None, help=info.help + shown)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

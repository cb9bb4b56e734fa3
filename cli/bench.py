"""`fewshot-rt bench`: what is measured, by name; a run's latency where none is given."""

import importlib
from difflib import get_close_matches
from pathlib import Path

import click

from fewshot_rt.errors import unknown

from .options import RUNS

MODULES = {
    "latency": ".bench_latency",
    "tasks": ".bench_tasks",
    "steps": ".bench_steps",
    "base": ".bench_base",
    "start": ".bench_start",
}
DEFAULT = "latency"


class _Benches(click.Group):
    """Measurements by name, each imported when it is needed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in MODULES and args[0] not in ctx.help_option_names):
            near = get_close_matches(args[0], MODULES, n=1, cutoff=0.7) if args else []
            if (
                near
                and "--runs" not in args
                and not any((place / args[0]).exists() for place in (Path(), RUNS))
            ):
                raise click.UsageError(unknown("bench or run", args[0], MODULES), ctx)
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(MODULES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in MODULES:
            return None
        command: click.Command = importlib.import_module(MODULES[name], __package__).command
        return command


@click.group(cls=_Benches)
def command() -> None:
    """Measure, and keep records.

    Without a name, `latency` is measured: fewshot-rt bench [RUN]. Each has its own --help and takes
    --json.
    """

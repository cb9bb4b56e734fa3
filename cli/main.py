"""`fewshot-rt`: the group of commands, and the one place where errors become exit statuses.

0: done. 1: our error, an interrupt, or any failed image. 2: wrong usage.
"""

import importlib
import json
import sys

import click

from fewshot_rt import __version__
from fewshot_rt.errors import ConfigError, FewshotError, unknown

COMMANDS = (
    *("check", "train", "distill", "export", "predict", "eval"),
    *("bench", "bases", "doctor", "pretrain"),
)
MODULES = {"eval": "evaluate"}  # `eval` is a builtin's name


class _Commands(click.Group):
    """Commands by name, each imported when it is needed: `--help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f".{MODULES.get(name, name)}", __package__)
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(unknown("command", args[0], COMMANDS), ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fewshot-rt")
def commands() -> None:
    """Show a video model a few before/after pictures; it answers a whole folder.

    \b
    fewshot-rt check PAIRS       look a folder of pairs over
    fewshot-rt train PAIRS       learn the task
    fewshot-rt export            freeze it for fast answers
    fewshot-rt predict DIR       answer every image in a folder

    PAIRS is a folder with input/ and target/ holding images of the same names. Every command takes
    --json, which ends stdout with one JSON document.
    """


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        status = commands.main(prog_name="fewshot-rt", standalone_mode=False)
    except click.ClickException as error:
        error.show(sys.stderr)
        status = _fail(error.format_message(), 2, is_shown=True)
    except ConfigError as error:
        status = _fail(str(error), 2)
    except FewshotError as error:
        status = _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        status = _fail(
            "interrupted. What is written stays. Give the command again to go on; "
            "to train, with --resume.",
            1,
        )
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int, *, is_shown: bool = False) -> int:
    if not is_shown:
        click.secho(f"error: {message}", fg="red", err=True)
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": message}))
    return status

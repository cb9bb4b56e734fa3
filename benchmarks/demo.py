"""`make demo`: the four commands that a user types, on photographs of coins."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from fewshot_rt.benchmarks.cases import write_coins

RUNS = Path("runs")
PAIRS = RUNS / "coins"
RUN = RUNS / "demo"


def main() -> None:
    """Write the pairs, type the four commands, and say where the answers are and how good."""
    started = time.monotonic()
    write_coins(PAIRS)
    _type("train", str(PAIRS), "--name", RUN.name, "--overwrite")
    _type("export", "--engine", "onnx")
    predicted = _type("predict", str(PAIRS / "test" / "input"), "--out", str(RUN / "answers"))
    result = _type("eval", str(PAIRS), "--panel", str(RUN / "panel.png"))
    scores = {who: values["iou"] for who, values in result["scores"].items()}
    seconds = time.monotonic() - started
    click.echo("")
    click.echo(f"answers   {RUN / 'answers'} ({predicted['done']} images)")
    click.echo(f"picture   {RUN / 'panel.png'}")
    click.echo("IoU       " + "   ".join(f"{who} {value:.3f}" for who, value in scores.items()))
    click.echo(f"speed     {result['images_per_second']:.1f} images a second on this processor")
    click.echo(f"all in    {seconds:.0f} s")


def _type(*words: str) -> dict[str, Any]:
    """Run a command as a user would and give its JSON; leave with its status if it fails."""
    click.secho(f"\n$ fewshot-rt {shlex.join(words)}", bold=True)
    # The console script stands beside the interpreter of the environment that runs this.
    script = Path(sys.executable).with_name("fewshot-rt")
    call = [str(script), *words, "--json"]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()

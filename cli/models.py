"""Find and open a model by what a person gave: a bundle, a run, the name of a run, or nothing."""

from pathlib import Path
from typing import Any

from fewshot_rt.errors import ConfigError, ModelError
from fewshot_rt.predictor import Predictor
from fewshot_rt.runs import CONFIG_FILE, MANIFEST_FILE, latest_run, newest_model, open_run


def find_run(given: Path | None, runs: Path) -> Path:
    """Find a run: a path, a name in `runs`, or the latest.

    Raises: ModelError if there is none.
    """
    if given is None:
        return latest_run(runs)
    for place in (given, runs / given):
        if (place / CONFIG_FILE).is_file():
            return place
    raise ModelError(f"{given} is no run, and {runs} holds none of that name.")


def find_model(given: Path | None, runs: Path) -> Path:
    """Find a bundle or a run: a path, a name in `runs`, or the newest of the latest run.

    Raises: ModelError if there is none.
    """
    if given is not None:
        for place in (given, runs / given):
            if (place / MANIFEST_FILE).is_file():
                return place
    return newest_model(find_run(given, runs))


def open_model(
    given: Path | None,
    runs: Path,
    *,
    device: str = "cpu",
    steps: int | None = None,
    solver: str | None = None,
    **of_run: Any,
) -> tuple[Predictor, Path]:
    """Open a model as a predictor; give its folder too.

    of_run: what only runs can do; see `open_run`.
    Raises: ModelError, EngineError; ConfigError if something is asked for that is of no use here.
    """
    asked = {name: value for name, value in of_run.items() if value}
    if "offload" in asked and device == "cpu":
        raise ConfigError("--offload brings blocks from the CPU to a GPU: give --device cuda.")
    place = _find_open_run(given, runs) if asked else find_model(given, runs)
    if (place / MANIFEST_FILE).is_file():
        from fewshot_rt.export.bundle import open_bundle

        predictor = open_bundle(place, device=device)
    else:
        predictor = open_run(place, device=device, **asked)
    changes = {"steps": steps, "solver": solver}
    given_ones = {name: value for name, value in changes.items() if value is not None}
    return (predictor.with_recipe(**given_ones) if given_ones else predictor), place


def _find_open_run(given: Path | None, runs: Path) -> Path:
    """Find a run for what bundles cannot do, even if it has bundles.

    Raises: ConfigError if a bundle is given; ModelError if there is no run.
    """
    if given is not None and any((p / MANIFEST_FILE).is_file() for p in (given, runs / given)):
        raise ConfigError(
            f"--offload, --drop-after and --accel-lora are for runs, and {given} is a bundle. Give "
            "its run; or give --accel-lora to `fewshot-rt export`, for a bundle that has it."
        )
    return find_run(given, runs)

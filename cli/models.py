"""Find and open a model by what a person gave: a bundle, a run, the name of a run, or nothing."""

from pathlib import Path

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
    offload: bool = False,
) -> tuple[Predictor, Path]:
    """Open a model as a predictor; give its folder too.

    offload: keep a run's large base on the CPU, and bring its blocks to the GPU one by one.
    Raises: ModelError, EngineError; ConfigError if there is nothing to offload.
    """
    place = find_model(given, runs)
    if offload:
        _require_offload(place, device)
    if (place / MANIFEST_FILE).is_file():
        from fewshot_rt.export.bundle import open_bundle

        predictor = open_bundle(place, device=device)
    else:
        predictor = open_run(place, device=device, offload=offload)
    return predictor if steps is None else predictor.with_recipe(steps=steps), place


def _require_offload(place: Path, device: str) -> None:
    if device == "cpu":
        raise ConfigError("--offload brings blocks from the CPU to a GPU: give --device cuda.")
    if (place / MANIFEST_FILE).is_file():
        raise ConfigError(f"--offload is for runs, and {place} is a bundle. Give its run.")

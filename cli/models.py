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
    is_sampled: bool = False,
    **way: Any,
) -> tuple[Predictor, Path]:
    """Open a model as a predictor; give its folder too.

    steps, is_sampled, way: see `steer`; for runs alone, drop_after, offload and acceleration, see
    `Recipe` and `open_run`; for bundles alone, hint, see `open_bundle`.
    Raises: ModelError, EngineError; ConfigError if something is asked for that is of no use here.
    """
    predictor, place, way = open_plain(given, runs, device=device, **way)
    return steer(predictor, steps=steps, is_sampled=is_sampled, **way), place


def open_plain(
    given: Path | None, runs: Path, *, device: str = "cpu", **way: Any
) -> tuple[Predictor, Path, dict[str, Any]]:
    """Open a model to be steered; give its folder and what is left for `steer`, too.

    way, Raises: as of `open_model`.
    """
    way = {name: value for name, value in way.items() if value}
    of_run = {name: way.pop(name) for name in ("offload", "acceleration") if name in way}
    hint = way.pop("hint", None)
    if "offload" in of_run and device == "cpu":
        raise ConfigError("--offload brings blocks from the CPU to a GPU: give --device cuda.")
    is_run = of_run or "drop_after" in way
    place = _find_open_run(given, runs) if is_run else find_model(given, runs)
    if (place / MANIFEST_FILE).is_file():
        from fewshot_rt.export.bundle import open_bundle

        predictor = open_bundle(place, device=device, hint=hint)
    elif hint:
        raise ConfigError(
            f"--hint is for bundles of openvino, and {place} is a run. Leave it out, or export "
            "the run for openvino."
        )
    else:
        predictor = open_run(place, device=device, drops="drop_after" in way, **of_run)
    if "acceleration" in of_run:
        way = {"noise": "seeded"} | way
    return predictor, place, way


def steer(
    predictor: Predictor, *, steps: int | None = None, is_sampled: bool = False, **way: Any
) -> Predictor:
    """Let a predictor, with the adapter that it has now, answer in another way.

    steps: None takes as few as the training found enough; with others, noise is of the kind that
    the adapter was made for. is_sampled: take the steps that it was made for. way: solver, noise
    and drop_after, see `Recipe`.
    Raises: ConfigError if something is asked for that is of no use here.
    """
    if is_sampled:
        steps = steps or predictor.recipe.trained_steps
        if steps == 1 and predictor.recipe.trained_noise == "seeded":
            raise ConfigError(
                "one step gives the mean of all answers, so that samples would agree: give "
                "--steps 4, say."
            )
    if steps is not None and steps != predictor.recipe.steps:
        way = {"noise": predictor.recipe.trained_noise, "steps": steps} | way
    return predictor.with_recipe(**way) if way else predictor


def place_run(runs: Path, name: str, *, resume: bool, overwrite: bool) -> Path:
    """Choose the run's folder; refuse to write over another run.

    Raises: ConfigError if the name leaves `runs`; ModelError if the run is there already.
    """
    folder = runs / name
    if folder.resolve().parent != runs.resolve() or name == "latest":
        raise ConfigError(f"a run's name must be one plain name, not {name!r}")
    if (folder / CONFIG_FILE).exists() and not resume and not overwrite:
        raise ModelError(
            f"the run {folder} is there already. Go on with it (--resume), replace it "
            "(--overwrite), or take another --name."
        )
    return folder


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

"""From a merged base to a bundle: capture, build, load and compare each role, then write."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fewshot_rt.adapter import Adapter
from fewshot_rt.base import Base
from fewshot_rt.errors import ConfigError, ModelError, unknown
from fewshot_rt.predictor import Recipe, Runner
from fewshot_rt.spec import ROLES, Signature

from .adapters import live_of, updates_of
from .bundle import (
    Contents,
    add_held,
    open_bundle,
    read_manifest,
    require_name,
    staged_bundle,
    write_bundle,
)
from .engine import Engine, Examples, require_engine, require_examples
from .model import (
    ANSWER,
    Arrays,
    Model,
    Trial,
    cases_of,
    cut_model,
    draw_pictures,
    make_trial,
)
from .parity import Parity, compare, require, worst
from .program import capture
from .quality import Pairs, Quality, batches, judge_quality

if TYPE_CHECKING:
    from torch import Tensor

    from .live import Update

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BuildStep:
    """One thing done: a stage (capture, build, load, parity) of a role, or one of the whole way.

    Those are "parity", "quality" and "write". parity: the worst figures by tensor, after a stage
    "parity". quality: after a stage "quality".
    """

    role: str
    stage: str
    seconds: float
    parity: Mapping[str, Parity] | None = None
    quality: Quality | None = None


def export_bundle(
    base: Base,
    *,
    recipe: Recipe,
    prompt: "Mapping[str, Tensor]",
    engine: str,
    precision: str,
    folder: Path,
    origin: Mapping[str, Any],
    adapter: tuple[str, Adapter] | None = None,
    pairs: Pairs = (),
) -> Iterator[BuildStep]:
    """Write a bundle of a base; yield after every stage.

    The folder appears, or an older bundle in it is replaced, only after every role and the whole
    way came close enough to eager. origin: licence, adapter and so on; base and revision are added.
    adapter: its name and itself, if it is not merged into the base yet; it is then, before the
    graphs are captured, or after it if the engine's weights are live: such a bundle keeps the
    base's own weights, and `add_adapter` gives it more adapters. pairs: inputs and targets of the
    task as their files have them; in fewer bits than fp32, scales are found on them, where the
    engine does that, and the bundle's answers must be as good on them as PyTorch's.

    Raises: ConfigError for an unknown engine or precision; EngineError if the engine cannot run
    here, parity or quality are not reached, or pairs are missing to find scales on; DataError if
    the folder cannot be written to.
    """
    tool = require_engine(engine)
    if precision not in tool.precisions:
        raise ConfigError(unknown(f"precision of engine {engine!r}", precision, tool.precisions))
    if adapter is not None and (not tool.is_live or precision in tool.merged):
        adapter[1].merge(base)
        adapter = None
    model = cut_model(base, prompt, recipe, engine=tool, precision=precision)
    with staged_bundle(folder) as staging:
        files = {role: f"{role}{tool.suffix}" for role in ROLES}
        paths = {role: staging / name for role, name in files.items()}
        trial = _try(model, tool, pairs)
        runners, parity = yield from _freeze(model, tool, trial, paths=paths)
        held = {}
        if adapter is not None:
            name, weights = adapter
            held[name] = _use(base, weights, runners["denoiser"])
            trial = _try(model, tool, pairs)
            parity |= yield from _judge_denoiser(model, runners["denoiser"], trial)
        parity |= yield from _judge_answer(model, runners, trial)
        quality = yield from _judge_quality(model, runners, pairs)
        started = time.perf_counter()
        contents = Contents(
            engine=engine,
            precision=precision,
            recipe=recipe,
            signatures=model.signatures,
            files=files,
            prompt=model.prompt,
            parity=parity,
            quality=quality,
            origin={"base": base.name, "revision": base.revision, **origin},
        )
        write_bundle(staging, contents, held)
    yield BuildStep(role=ANSWER, stage="write", seconds=time.perf_counter() - started)


def add_adapter(
    base: Base,
    adapter: tuple[str, Adapter],
    *,
    recipe: Recipe,
    prompt: "Mapping[str, Tensor]",
    folder: Path,
    origin: Mapping[str, Any],
    pairs: Pairs = (),
) -> Iterator[BuildStep]:
    """Add an adapter to a bundle whose weights are live; nothing is compiled. Yield every stage.

    base: as the bundle's was, without an adapter; this one is merged into it. adapter: its name and
    itself. origin, pairs: as for `export_bundle`.

    Raises: ConfigError if the name is taken; ModelError if the adapter was made for another base,
    size or prompt; EngineError if parity or quality are not reached or the engine's weights are not
    live.
    """
    name, weights = adapter
    manifest = read_manifest(folder)
    if name in manifest.get("adapters", {}):
        raise ConfigError(f"{folder} has an adapter {name!r} already. Give another --name.")
    require_name(name)
    engine, precision = require_engine(manifest["engine"]), manifest["precision"]
    model = cut_model(base, prompt, recipe, engine=engine, precision=precision)
    origin = {"base": base.name, "revision": base.revision, **origin}
    _require_same(manifest, model, origin)
    predictor = open_bundle(folder, device=str(base.device))
    runner = predictor.runners["denoiser"]
    updates = _use(base, weights, runner)
    trial = _try(model, engine, pairs)
    parity = yield from _judge_denoiser(model, runner, trial)
    parity |= yield from _judge_answer(model, predictor.runners, trial)
    quality = yield from _judge_quality(model, predictor.runners, pairs)
    started = time.perf_counter()
    said = {"recipe": recipe, "parity": parity, "quality": quality, "origin": origin}
    add_held(folder, name, updates, model.prompt, **said)
    yield BuildStep(role=ANSWER, stage="write", seconds=time.perf_counter() - started)


def _use(base: Base, adapter: Adapter, runner: Runner) -> "dict[str, Update]":
    """Put an adapter into a base and into the live weights of its frozen denoiser."""
    live, updates = live_of(runner), updates_of(adapter)
    adapter.merge(base)
    live.use(updates)
    return updates


def _require_same(manifest: Mapping[str, Any], model: Model, origin: Mapping[str, Any]) -> None:
    """Require that an adapter fits the compiled code. Raises: ModelError that says what differs."""
    for name in ("base", "revision", "acceleration"):
        there, here = manifest["origin"].get(name), origin.get(name)
        if there != here:
            raise ModelError(f"the bundle has {name} {there}, and the adapter was made for {here}.")
    for role in ROLES:
        signature = Signature.from_dict(manifest["roles"][role]["signature"])
        if signature.to_dict() != Signature.from_dict(model.signatures[role].to_dict()).to_dict():
            raise ModelError(
                "the adapter was made for another size, number of frames, batch or prompt than the "
                f"bundle's {role} has. Export it to a bundle of its own."
            )


def _freeze(
    model: Model, tool: Engine, trial: Trial, *, paths: Mapping[str, Path]
) -> Generator[BuildStep, None, tuple[dict[str, Runner], dict[str, Mapping[str, Parity]]]]:
    """Build each role into its file and compare it at once; give runners and parity."""
    runners: dict[str, Runner] = {}
    parity: dict[str, Mapping[str, Parity]] = {}
    for role in ROLES:
        examples = trial.cases[role] if role in model.scaled else ()
        runners[role] = yield from _freeze_role(
            model, tool, role=role, path=paths[role], examples=examples
        )
        parity[role] = yield from _judge_role(model, role, runners[role], trial)
    return runners, parity


def _judge_denoiser(
    model: Model, runner: Runner, trial: Trial
) -> Generator[BuildStep, None, dict[str, Mapping[str, Parity]]]:
    """Compare a denoiser with eager, both with an adapter."""
    return {"denoiser": (yield from _judge_role(model, "denoiser", runner, trial))}


def _judge_answer(
    model: Model, runners: Mapping[str, Runner], trial: Trial
) -> Generator[BuildStep, None, dict[str, Mapping[str, Parity]]]:
    """Compare the whole way with eager."""
    frozen, expected = model.predictor(runners), {"image": trial.answers}
    pairs = ((expected, {"image": frozen.answer(p)}) for p in (trial.pictures,))
    return {ANSWER: (yield from _judge(model, ANSWER, pairs))}


def _judge_quality(
    model: Model, runners: Mapping[str, Runner], pairs: Pairs
) -> Generator[BuildStep, None, Quality | None]:
    """Judge by the task's metric where bits were given up and there are pairs to judge on."""
    if model.precisions[ANSWER] == "fp32" or not pairs:
        return None
    started = time.perf_counter()
    eager, engine = model.predictor(model.runners), model.predictor(runners)
    quality = judge_quality(eager, engine, pairs)
    seconds = time.perf_counter() - started
    yield BuildStep(role=ANSWER, stage="quality", seconds=seconds, quality=quality)
    return quality


def _try(model: Model, tool: Engine, pairs: Pairs) -> Trial:
    """Answer eagerly what is compared: drawn pictures, or the pairs' where scales depend on them.

    Raises: EngineError if there are no pairs to find scales on.
    """
    if not model.scaled:
        return make_trial(model, [draw_pictures(model.recipe)])
    require_examples(tool.name, model.precisions[ANSWER], pairs)
    return make_trial(model, list(batches(model.recipe, pairs)))


def _freeze_role(
    model: Model, tool: Engine, *, role: str, path: Path, examples: Examples
) -> Generator[BuildStep, None, Runner]:
    """Capture one role, build it into a file, and open that file."""
    signature, precision = model.signatures[role], model.precisions[role]
    program = yield from timed(
        role, "capture", lambda: capture(model.roles[role], signature, role=role)
    )
    yield from timed(
        role,
        "build",
        lambda: tool.build(program, path, precision=precision, examples=examples),
    )
    return (yield from timed(role, "load", lambda: tool.load(path, signature, device=model.device)))


def timed(role: str, stage: str, work: Callable[[], T]) -> Generator[BuildStep, None, T]:
    """Do some work and give its result; yield how long it took."""
    started = time.perf_counter()
    result = work()
    yield BuildStep(role=role, stage=stage, seconds=time.perf_counter() - started)
    return result


def _judge_role(
    model: Model, role: str, runner: Runner, trial: Trial
) -> Generator[BuildStep, None, dict[str, Parity]]:
    cases = cases_of(model, role, trial)
    pairs = ((model.runners[role](case), runner(case)) for case in cases)
    return (yield from _judge(model, role, pairs))


def _judge(
    model: Model, role: str, pairs: Iterator[tuple[Arrays, Arrays]]
) -> Generator[BuildStep, None, dict[str, Parity]]:
    """Compare pairs of (eager, engine), require each to be close enough, and give the worst."""
    started = time.perf_counter()
    figures = []
    for reference, candidate in pairs:
        figures.append(compare(reference, candidate))
        require(figures[-1], role=role, tolerance=model.precisions[role])
    parity = worst(figures)
    yield BuildStep(role=role, stage="parity", seconds=time.perf_counter() - started, parity=parity)
    return parity

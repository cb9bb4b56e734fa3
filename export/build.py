"""From a merged base to a bundle: capture, build, load and compare each role, then write.

Axes: B batch, C channels, H W pixels.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fewshot_rt.adapter import Adapter
from fewshot_rt.base import Base
from fewshot_rt.errors import ConfigError, ModelError, unknown
from fewshot_rt.predictor import Floats, Predictor, Recipe, Runner
from fewshot_rt.roles import Role, make_roles, make_signatures, run_eagerly
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
from .engine import Engine, require_engine
from .parity import Parity, compare, require, worst
from .program import capture

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]
Cases = Mapping[str, Sequence[Arrays]]  # what each role is given, by its name
ANSWER = "answer"  # the name under which the whole way is compared


@dataclass(frozen=True, kw_only=True)
class BuildStep:
    """One thing done: a stage (capture, build, load, parity) of a role, or "write" of the bundle.

    parity: the worst figures by tensor, after a stage "parity".
    """

    role: str
    stage: str
    seconds: float
    parity: Mapping[str, Parity] | None = None


@dataclass(frozen=True)
class Model:
    """What is frozen: the roles of a base, and how eager runs them, the reference of all parity.

    precisions: of each role, and of the whole way.
    """

    roles: Mapping[str, Role]
    signatures: Mapping[str, Signature]
    runners: Mapping[str, Runner]
    precisions: Mapping[str, str]
    prompt: Arrays
    recipe: Recipe
    device: str

    def predictor(self, runners: Mapping[str, Runner]) -> Predictor:
        """Let other runners answer with the same prompt and recipe."""
        return Predictor(runners, prompt=self.prompt, recipe=self.recipe, origin=ANSWER)


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
) -> Iterator[BuildStep]:
    """Write a bundle of a base; yield after every stage.

    The folder appears, or an older bundle in it is replaced, only after every role and the whole
    way came close enough to eager. origin: licence, adapter and so on; base and revision are added.
    adapter: its name and itself, if it is not merged into the base yet; it is then, before the
    graphs are captured, or after it if the engine's weights are live: such a bundle keeps the
    base's own weights, and `add_adapter` gives it more adapters.

    Raises: ConfigError for an unknown engine or precision; EngineError if the engine cannot run
    here or the parity is not reached; DataError if the folder cannot be written to.
    """
    tool = require_engine(engine)
    if precision not in tool.precisions:
        raise ConfigError(unknown(f"precision of engine {engine!r}", precision, tool.precisions))
    if adapter is not None and not tool.is_live:
        adapter[1].merge(base)
        adapter = None
    model = cut_model(base, prompt, recipe, precision=precision)
    with staged_bundle(folder) as staging:
        files = {role: f"{role}{tool.suffix}" for role in ROLES}
        paths = {role: staging / name for role, name in files.items()}
        cases, answer = _realistic(model)
        runners, parity = yield from _freeze(model, tool, cases, paths=paths)
        held = {}
        if adapter is not None:
            name, weights = adapter
            updates = updates_of(weights)
            weights.merge(base)
            live_of(runners["denoiser"]).use(updates)
            cases, answer = _realistic(model)
            parity |= yield from _judge_denoiser(model, runners["denoiser"], cases)
            held[name] = updates
        parity |= yield from _judge_answer(model, runners, answer)
        started = time.perf_counter()
        contents = Contents(
            engine=engine,
            precision=precision,
            recipe=recipe,
            signatures=model.signatures,
            files=files,
            prompt=model.prompt,
            parity=parity,
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
) -> Iterator[BuildStep]:
    """Add an adapter to a bundle whose weights are live; nothing is compiled. Yield every stage.

    base: as the bundle's was, without an adapter; this one is merged into it. adapter: its name and
    itself. origin: as for `export_bundle`.

    Raises: ConfigError if the name is taken; ModelError if the adapter was made for another base,
    size or prompt; EngineError if the parity is not reached or the engine's weights are not live.
    """
    name, weights = adapter
    manifest = read_manifest(folder)
    if name in manifest.get("adapters", {}):
        raise ConfigError(f"{folder} has an adapter {name!r} already. Give another --name.")
    require_name(name)
    model = cut_model(base, prompt, recipe, precision=manifest["precision"])
    origin = {"base": base.name, "revision": base.revision, **origin}
    _require_same(manifest, model, origin)
    predictor = open_bundle(folder, device=str(base.device))
    runner = predictor.runners["denoiser"]
    live, updates = live_of(runner), updates_of(weights)
    weights.merge(base)
    live.use(updates)
    cases, answer = _realistic(model)
    parity = yield from _judge_denoiser(model, runner, cases)
    parity |= yield from _judge_answer(model, predictor.runners, answer)
    started = time.perf_counter()
    add_held(folder, name, updates, model.prompt, recipe=recipe, parity=parity, origin=origin)
    yield BuildStep(role=ANSWER, stage="write", seconds=time.perf_counter() - started)


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


def cut_model(
    base: Base, prompt: "Mapping[str, Tensor]", recipe: Recipe, *, precision: str
) -> Model:
    """Cut a base into what is frozen; its weights are read at each call, so they may change."""
    # The batch axis varies even where a predictor always fills batches of one.
    signatures = make_signatures(
        base,
        prompt,
        latents=recipe.latent_shape,
        size=recipe.size,
        batch=max(2, recipe.batch),
    )
    roles = make_roles(base, signatures)
    runners = {n: run_eagerly(roles[n], signatures[n], device=base.device) for n in ROLES}
    precisions = {role: _precision_of(role, base, precision) for role in ROLES} | {
        ANSWER: precision
    }
    fixed = {name: value.detach().cpu().numpy() for name, value in prompt.items()}
    return Model(roles, signatures, runners, precisions, fixed, recipe, str(base.device))


def _precision_of(role: str, base: Base, precision: str) -> str:
    """Give the precision of a role: 8 bits are for the denoiser, and some coders need fp32."""
    if role == "denoiser":
        return precision
    if role in base.exact_roles:
        return "fp32"
    return "bf16" if precision in ("int8", "fp8") else precision


def _freeze(
    model: Model, tool: Engine, cases: Cases, *, paths: Mapping[str, Path]
) -> Generator[BuildStep, None, tuple[dict[str, Runner], dict[str, Mapping[str, Parity]]]]:
    """Build each role into its file and compare it at once; give runners and parity."""
    runners: dict[str, Runner] = {}
    parity: dict[str, Mapping[str, Parity]] = {}
    for role in ROLES:
        runners[role] = yield from _freeze_role(model, tool, role=role, path=paths[role])
        parity[role] = yield from _judge_role(model, role, runners[role], cases[role])
    return runners, parity


def _judge_denoiser(
    model: Model, runner: Runner, cases: Cases
) -> Generator[BuildStep, None, dict[str, Mapping[str, Parity]]]:
    """Compare a denoiser with eager, both with an adapter."""
    name = "denoiser"
    return {name: (yield from _judge_role(model, name, runner, cases[name]))}


def _judge_answer(
    model: Model, runners: Mapping[str, Runner], expected: Arrays
) -> Generator[BuildStep, None, dict[str, Mapping[str, Parity]]]:
    """Compare the whole way with eager."""
    frozen = model.predictor(runners)
    pairs = ((expected, {"image": frozen.answer(p)}) for p in (_pictures(model.recipe),))
    return {ANSWER: (yield from _judge(model, ANSWER, pairs))}


def _freeze_role(
    model: Model, tool: Engine, *, role: str, path: Path
) -> Generator[BuildStep, None, Runner]:
    """Capture one role, build it into a file, and open that file."""
    signature, precision = model.signatures[role], model.precisions[role]
    program = yield from _timed(
        role, "capture", lambda: capture(model.roles[role], signature, role=role)
    )
    yield from _timed(role, "build", lambda: tool.build(program, path, precision=precision))
    return (
        yield from _timed(role, "load", lambda: tool.load(path, signature, device=model.device))
    )


def _timed(role: str, stage: str, work: Callable[[], T]) -> Generator[BuildStep, None, T]:
    started = time.perf_counter()
    result = work()
    yield BuildStep(role=role, stage=stage, seconds=time.perf_counter() - started)
    return result


def _judge_role(
    model: Model, role: str, runner: Runner, cases: Sequence[Arrays]
) -> Generator[BuildStep, None, dict[str, Parity]]:
    every = (*_random(model.signatures[role]), *cases)
    pairs = ((model.runners[role](case), runner(case)) for case in every)
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


def _random(signature: Signature) -> Iterator[dict[str, np.ndarray]]:
    """Draw inputs at the least, the usual and the greatest sizes."""
    for index in range(3):
        sizes = {axis: bounds[index] for axis, bounds in signature.sizes.items()}
        yield signature.example(seed=index + 1, **sizes)


def _realistic(
    model: Model,
) -> tuple[dict[str, list[Arrays]], dict[str, np.ndarray]]:
    """Answer pictures eagerly; give what each role was given on the way, and the answer."""
    seen: dict[str, list[Arrays]] = {role: [] for role in ROLES}

    def recording(role: str) -> Runner:
        def runner(tensors: Arrays) -> dict[str, np.ndarray]:
            seen[role].append(tensors)
            return model.runners[role](tensors)

        return runner

    answer = model.predictor({role: recording(role) for role in ROLES}).answer(
        _pictures(model.recipe)
    )
    return seen, {"image": answer}


def _pictures(recipe: Recipe) -> Floats:
    """Draw a batch of pictures: smooth shades and a bright disc each, with sharp edges.

    Shapes: [B, 3, H, W] in [-1, 1].
    """
    rng = np.random.default_rng(0)
    height, width = recipe.size
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    pictures = np.empty((recipe.batch, 3, height, width), np.float32)
    for picture in pictures:
        slopes, centre = rng.uniform(-1, 1, (3, 2)), rng.uniform(-0.5, 0.5, 2)
        is_disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 0.2
        for channel, (down, right) in zip(picture, slopes, strict=True):
            channel[:] = np.where(is_disc, rng.uniform(-1, 1), np.sin(2 * (down * y + right * x)))
    return pictures

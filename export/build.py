"""From a merged base to a bundle: capture, build, load and compare each role, then write.

Axes: B batch, C channels, H W pixels.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fewshot_rt.base import Base
from fewshot_rt.errors import ConfigError, unknown
from fewshot_rt.predictor import Floats, Predictor, Recipe, Runner
from fewshot_rt.roles import Role, make_roles, make_signatures, run_eagerly
from fewshot_rt.spec import ROLES, Signature

from .bundle import Contents, staged_bundle, write_bundle
from .engine import Engine, require_engine
from .parity import Parity, compare, require, worst
from .program import capture

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]
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
class _Model:
    """What is frozen: the roles of a base, and how eager runs them, the reference of all parity."""

    roles: Mapping[str, Role]
    signatures: Mapping[str, Signature]
    runners: Mapping[str, Runner]
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
) -> Iterator[BuildStep]:
    """Write a bundle of a base whose adapter is merged; yield after every stage.

    The folder appears, or an older bundle in it is replaced, only after every role and the whole
    way came close enough to eager. origin: licence, adapter and so on; base and revision are added.

    Raises: ConfigError for an unknown engine or precision; EngineError if the engine cannot run
    here or the parity is not reached; DataError if the folder cannot be written to.
    """
    tool = require_engine(engine)
    if precision not in tool.precisions:
        raise ConfigError(unknown(f"precision of engine {engine!r}", precision, tool.precisions))
    model = _cut(base, prompt, recipe)
    with staged_bundle(folder) as staging:
        files = {role: f"{role}{tool.suffix}" for role in ROLES}
        parity = yield from _freeze(
            model, tool, paths={role: staging / name for role, name in files.items()},
            precision=precision,
        )  # fmt: skip
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
        write_bundle(staging, contents)
    yield BuildStep(role=ANSWER, stage="write", seconds=time.perf_counter() - started)


def _cut(base: Base, prompt: "Mapping[str, Tensor]", recipe: Recipe) -> _Model:
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
    fixed = {name: value.detach().cpu().numpy() for name, value in prompt.items()}
    return _Model(roles, signatures, runners, fixed, recipe, str(base.device))


def _freeze(
    model: _Model, tool: Engine, *, paths: Mapping[str, Path], precision: str
) -> Generator[BuildStep, None, dict[str, Mapping[str, Parity]]]:
    """Build each role into its file and compare it at once, then the whole way; give the parity."""
    pictures = _pictures(model.recipe)
    cases, answer = _realistic(model, pictures)
    runners: dict[str, Runner] = {}
    parity: dict[str, Mapping[str, Parity]] = {}
    for role in ROLES:
        runners[role] = yield from _freeze_role(
            model, tool, role=role, path=paths[role], precision=precision
        )
        pairs = (
            (model.runners[role](case), runners[role](case))
            for case in (*_random(model.signatures[role]), *cases[role])
        )
        parity[role] = yield from _judge(role, pairs, precision=precision)
    frozen = model.predictor(runners)
    pairs = ((answer, {"image": frozen.answer(shown)}) for shown in (pictures,))
    parity[ANSWER] = yield from _judge(ANSWER, pairs, precision=precision)
    return parity


def _freeze_role(
    model: _Model, tool: Engine, *, role: str, path: Path, precision: str
) -> Generator[BuildStep, None, Runner]:
    """Capture one role, build it into a file, and open that file."""
    signature = model.signatures[role]
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


def _judge(
    role: str, pairs: Iterator[tuple[Arrays, Arrays]], *, precision: str
) -> Generator[BuildStep, None, dict[str, Parity]]:
    """Compare pairs of (eager, engine), require each to be close enough, and give the worst."""
    started = time.perf_counter()
    figures = []
    for reference, candidate in pairs:
        figures.append(compare(reference, candidate))
        require(figures[-1], role=role, tolerance=precision)
    parity = worst(figures)
    yield BuildStep(role=role, stage="parity", seconds=time.perf_counter() - started, parity=parity)
    return parity


def _random(signature: Signature) -> Iterator[dict[str, np.ndarray]]:
    """Draw inputs at the least, the usual and the greatest sizes."""
    for index in range(3):
        sizes = {axis: bounds[index] for axis, bounds in signature.sizes.items()}
        yield signature.example(seed=index + 1, **sizes)


def _realistic(
    model: _Model, pictures: Floats
) -> tuple[dict[str, list[Arrays]], dict[str, np.ndarray]]:
    """Answer pictures eagerly; give what each role was given on the way, and the answer."""
    seen: dict[str, list[Arrays]] = {role: [] for role in ROLES}

    def recording(role: str) -> Runner:
        def runner(tensors: Arrays) -> dict[str, np.ndarray]:
            seen[role].append(tensors)
            return model.runners[role](tensors)

        return runner

    answer = model.predictor({role: recording(role) for role in ROLES}).answer(pictures)
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

"""What is frozen: a base cut into its roles, how eager runs them, and what each is tried on.

Axes: B batch, C channels, H W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fewshot_rt.base import Base
from fewshot_rt.predictor import Floats, Predictor, Recipe, Runner
from fewshot_rt.roles import Role, make_roles, make_signatures, run_eagerly
from fewshot_rt.spec import ROLES, Signature

from .engine import Engine

if TYPE_CHECKING:
    from torch import Tensor

Arrays = Mapping[str, np.ndarray]
Cases = Mapping[str, Sequence[Arrays]]  # what each role is given, by its name
ANSWER = "answer"  # the name under which the whole way is compared


@dataclass(frozen=True)
class Trial:
    """What frozen roles are tried on: what eager gave each on the way from pictures to answers.

    Shapes: pictures, answers [B, 3, H, W] in [-1, 1], of the first batch.
    """

    cases: Cases
    pictures: Floats
    answers: Floats


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is frozen: the roles of a base, and how eager runs them, the reference of all parity.

    precisions: of each role, and of the whole way. scaled: the roles whose scales are found on
    examples, so that they are right for what is like these alone.
    """

    roles: Mapping[str, Role]
    signatures: Mapping[str, Signature]
    runners: Mapping[str, Runner]
    precisions: Mapping[str, str]
    scaled: frozenset[str]
    prompt: Arrays
    recipe: Recipe
    device: str

    def predictor(self, runners: Mapping[str, Runner]) -> Predictor:
        """Let other runners answer with the same prompt and recipe."""
        return Predictor(runners, prompt=self.prompt, recipe=self.recipe, origin=ANSWER)


def cut_model(
    base: Base,
    prompt: "Mapping[str, Tensor]",
    recipe: Recipe,
    *,
    engine: Engine,
    precision: str,
) -> Model:
    """Cut a base into what is frozen; its weights are read at each call, so they may change."""
    # Else the batch axis varies even where a predictor always fills batches of one.
    batch = recipe.batch if engine.is_fixed else max(2, recipe.batch)
    signatures = make_signatures(
        base,
        prompt,
        latents=recipe.latent_shape,
        size=recipe.size,
        batch=batch,
        least=batch if engine.is_fixed else 1,
    )
    roles = make_roles(base, signatures)
    runners = {n: run_eagerly(roles[n], signatures[n], device=base.device) for n in ROLES}
    precisions = {role: precision_of(role, base, precision, engine) for role in ROLES} | {
        ANSWER: precision
    }
    return Model(
        roles=roles,
        signatures=signatures,
        runners=runners,
        precisions=precisions,
        scaled=frozenset(r for r, known in precisions.items() if known in engine.calibrated),
        prompt={name: value.detach().cpu().numpy() for name, value in prompt.items()},
        recipe=recipe,
        device=str(base.device),
    )


def precision_of(role: str, base: Base, precision: str, engine: Engine) -> str:
    """Give the precision of a role: few coders take 8 bits, and some need fp32."""
    if role == "denoiser":
        return precision
    if role in base.exact_roles:
        return "fp32"
    is_small = role in base.tiny_roles and precision in engine.tiny
    return precision if is_small else engine.coders.get(precision, precision)


def make_trial(model: Model, pictures: Sequence[Floats]) -> Trial:
    """Answer batches of pictures eagerly, and keep what each role was given.

    Shapes: pictures [B, 3, H, W] in [-1, 1] each.
    """
    seen: dict[str, list[Arrays]] = {role: [] for role in ROLES}

    def recording(role: str) -> Runner:
        def runner(tensors: Arrays) -> dict[str, np.ndarray]:
            seen[role].append(tensors)
            return model.runners[role](tensors)

        return runner

    predictor = model.predictor({role: recording(role) for role in ROLES})
    answers = [predictor.answer(batch) for batch in pictures]
    return Trial(seen, pictures[0], answers[0])


def cases_of(model: Model, role: str, trial: Trial) -> Iterator[Arrays]:
    """Give what a role is compared on: the trial's, and others at the least to the greatest sizes.

    These are drawn; or parts of the trial's, where scales were found on what is like them.
    """
    signature = model.signatures[role]
    for index in range(3):
        sizes = {axis: bounds[index] for axis, bounds in signature.sizes.items()}
        if role in model.scaled:
            yield _part(signature, trial.cases[role][0], sizes)
        else:
            yield signature.example(seed=index + 1, **sizes)
    yield from trial.cases[role]


def _part(signature: Signature, case: Arrays, sizes: Mapping[str, int]) -> Arrays:
    """Take the first rows of a case along the axes that vary; again, where there are too few."""
    part = dict(case)
    for spec in signature.inputs:
        for position, axis in signature.varying(spec):
            value = part[spec.name]
            rows = np.arange(sizes[axis]) % value.shape[position]
            part[spec.name] = np.take(value, rows, axis=position)
    return part


def draw_pictures(recipe: Recipe) -> Floats:
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

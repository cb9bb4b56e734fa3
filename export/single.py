"""One file: the whole way from an image to its answer as one program, uint8 in and uint8 out.

What a predictor does around its three roles in NumPy and Pillow is here in torch, so that it is in
the graph, and whatever runs ONNX answers images. Answers are RGB as images are, whatever the codec:
where a bundle writes one gray channel, here are three equal ones.

Axes: B batch, H W pixels of a file, h w pixels of a model, C F latents, K colours.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewshot_rt.adapter import Adapter
from fewshot_rt.base import Base
from fewshot_rt.cards import find_card
from fewshot_rt.codecs import SCORE_WIDTH, Codec
from fewshot_rt.errors import ConfigError, EngineError, unknown
from fewshot_rt.files import whole
from fewshot_rt.images import Pixels, to_uint8, with_channels
from fewshot_rt.images import resize as resize_array
from fewshot_rt.predict import answer_images
from fewshot_rt.predictor import WAY, Predictor, Recipe, Runner, seeded_noises
from fewshot_rt.roles import BATCH, Role
from fewshot_rt.runs import base_predictor
from fewshot_rt.sample import keep_ends, sample
from fewshot_rt.spec import Signature, TensorSpec

from .build import BuildStep, timed
from .engine import require_engine, require_examples
from .model import ANSWER
from .onnx_graph import LARGEST_INLINE_BYTES, annotate
from .parity import compare, worst
from .program import Program, capture
from .quality import Pairs, judge_answers

ENGINE, PRECISIONS = "onnx", ("fp32", "int8")
MOST_IMAGES, LONGEST_SIDE = 256, 1 << 14
# Of pixels. The answer in [-1, 1] may differ by 1e-5, which is 1/800 of a level: one value in 400
# lies so near to the middle between two levels, and of a pixel's three one in 130. Masks and labels
# change at their outlines alone.
MOST_CHANGED = 0.01


def export_single(
    base: Base,
    *,
    recipe: Recipe,
    prompt: Mapping[str, Tensor],
    path: Path,
    origin: Mapping[str, Any],
    adapter: Adapter | None = None,
    precision: str = "fp32",
    pairs: Pairs = (),
) -> Iterator[BuildStep]:
    """Write a base as one ONNX file from images to answers; yield after every stage.

    The file appears, or takes the place of an older one, only after it answered pictures of several
    sizes and batches as eager does; in int8, pairs of the task as well as eager does, and pictures
    in batches as each alone. adapter: if it is not merged into the base yet; it is then. origin: as
    for `export_bundle`; it goes, with what else is known, into the file's properties. precision:
    one of `PRECISIONS`. pairs: inputs and targets as their files have them; int8 finds its scales
    on them, too.

    Raises: EngineError if ONNX Runtime is not there, the model is too large for one file, there are
    no pairs for int8, or the file answers otherwise, or worse; DataError if it cannot be written.
    """
    tool = require_engine(ENGINE)
    if precision not in PRECISIONS:
        raise ConfigError(unknown("precision of one file", precision, PRECISIONS))
    if precision != "fp32":
        require_examples(ENGINE, precision, pairs)
    said = {"precision": precision, **origin}
    properties = describe(base, recipe, adapter=adapter, origin=said)
    if adapter is not None:
        adapter.merge(base)
    way, signature = make_way(base, recipe, prompt), make_signature(recipe)
    with whole(path) as part:
        program = yield from timed(ANSWER, "capture", lambda: capture(way, signature, role=ANSWER))
        _require_small(program, path)
        noise = _default_noise(recipe)
        examples = [{"image": image[None], **noise} for image, _ in pairs]
        yield from timed(
            ANSWER,
            "build",
            lambda: tool.build(program, part, precision=precision, examples=examples),
        )
        annotate(part, properties, defaults=noise)
        images_alone = replace(signature, inputs=signature.inputs[:1])
        runner = yield from timed(ANSWER, "load", lambda: tool.load(part, images_alone))
        eager = base_predictor(base, recipe, prompt, origin=ANSWER)
        if precision == "fp32":
            yield from _judge(eager, runner)
        else:
            yield from _judge_by_metric(eager, runner, pairs)
        started = time.perf_counter()
    yield BuildStep(role=ANSWER, stage="write", seconds=time.perf_counter() - started)


def describe(
    base: Base, recipe: Recipe, *, adapter: Adapter | None, origin: Mapping[str, Any]
) -> dict[str, str]:
    """Say what a file is and where it came from, in words, numbers and JSON lists.

    height, width: in pixels, as the model sees images. steps: of denoising; updates: of training.
    """
    card, (height, width) = find_card(base.name), recipe.size
    said = {
        "task": recipe.task,
        "codec": recipe.codec.name,
        "colours": recipe.codec.colours,
        "height": height,
        "width": width,
        "steps": recipe.steps,
        "noise": recipe.noise,
        "base": base.name,
        "revision": base.revision,
        "licence": card.licence if card else f"that of {base.name}",
        **origin,
    }
    if adapter is not None:
        known = adapter.provenance
        said |= {"shots": known.shots, "seed": known.seed, "objective": known.objective}
        said |= {"updates": known.steps, "task_digest": known.digest}
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in said.items()
        if value not in ((), [], None)
    }


def make_signature(recipe: Recipe) -> Signature:
    """Describe images and answers of any number and size, and the noise if the recipe has any."""
    axes = (BATCH, "height", "width", 3)
    inputs = [TensorSpec("image", "uint8", axes)]
    if recipe.noise == "seeded":
        inputs.append(TensorSpec("noise", "float32", (1, *recipe.latent_shape)))
    height, width = recipe.size
    # The usual sizes differ from the model's and from each other, so that none passes for another.
    sizes = {
        BATCH: (1, 2, MOST_IMAGES),
        "height": (1, height + 3, LONGEST_SIDE),
        "width": (1, 2 * width + 5, LONGEST_SIDE),
    }
    outputs = (TensorSpec("answer", "uint8", axes),)
    return Signature(inputs=tuple(inputs), outputs=outputs, sizes=sizes)


def make_way(base: Base, recipe: Recipe, prompt: Mapping[str, Tensor]) -> Role:
    """Give the module that takes images, and noise if the recipe has any, and gives answers.

    All steps are unrolled, and the prompt is a constant.
    Shapes: images uint8 [B, H, W, 3]; noise [1, C, F, h, w]; answers uint8 [B, H, W, 3].
    """
    denoiser, frames = base.denoiser(), recipe.latent_shape[1]

    def shorten(value: Tensor, left: int) -> Tensor:
        """Give a condition of as many latent frames as are left."""
        is_long = value.ndim == 5 and left < frames == value.shape[2]
        return keep_ends(value, recipe.ends) if is_long else value

    def answer(image: Tensor, *noises: Tensor) -> tuple[Tensor, ...]:
        pixels = to_model(image, recipe.size)
        conditions = {**base.condition(pixels, frames=frames), **prompt}

        def denoise(noisy: Tensor, time: Tensor) -> Tensor:
            fitting = {name: shorten(v, noisy.shape[2]) for name, v in conditions.items()}
            prediction: Tensor = denoiser(noisy, time, **fitting)
            return prediction

        shape = (image.shape[0], *recipe.latent_shape)
        noise = noises[0].expand(shape) if noises else pixels.new_zeros(shape)
        *_, last = sample(denoise, noise, **{name: getattr(recipe, name) for name in WAY})
        height, width = image.shape[1:3]
        return (decode(recipe.codec, base.decode_last(last.latents), (height, width)),)

    return Role(answer, {**base.networks(), "denoiser": denoiser})


def to_model(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Do as `images.to_model`, for many.

    Shapes: image uint8 [B, H, W, 3]; size (h, w); result [B, 3, h, w].
    """
    batch, height, width, channels = image.shape
    down = resizing(height, size[0], device=image.device)
    across = resizing(width, size[1], device=image.device)
    # The large image is read once, as it lies: down first, with columns and channels in one.
    lower = down @ image.reshape(batch, height, width * channels).float()
    planes = lower.reshape(batch, size[0], width, channels).permute(0, 3, 1, 2)
    return (planes @ across.T / 127.5 - 1).clamp(-1, 1)


def decode(codec: Codec, answer: Tensor, size: tuple[int, int]) -> Tensor:
    """Do as `Codec.decode`, for many, and in three channels; what is not finite is not noticed.

    Shapes: answer [B, 3, h, w]; size (H, W); result uint8 [B, H, W, 3].
    """
    if codec.name == "labels":
        return _in_colours(codec, resize(_scores(codec, answer), size).argmax(dim=1))
    values = resize(answer, size).clamp(-1, 1)
    if codec.name == "mask":
        return _in_colours(codec, (values.mean(dim=1) > 0).long())
    if codec.name == "gray":
        values = values.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return (values * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def resize(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Do as `images.resize`. Shapes: planes [..., h, w]; size (H, W); result [..., H, W]."""
    down = resizing(planes.shape[-2], size[0], device=planes.device)
    across = resizing(planes.shape[-1], size[1], device=planes.device)
    return down @ (planes @ across.T)


def resizing(given: int, wanted: int, *, device: torch.device) -> Tensor:
    """Give the matrix that resizes a side by cubic interpolation, antialiased where it shrinks.

    Shapes: [wanted, given].
    Source: Keys 1981, with a = -1/2; the kernel is widened where the side shrinks, as in Pillow.
    """
    # In units of 1 / (2 x given x wanted) of the side, places are whole numbers, and exact.
    places = (2 * torch.arange(given, device=device) + 1) * wanted
    centres = (2 * torch.arange(wanted, device=device) + 1) * given
    longer = torch.maximum(places.new_full((), given), places.new_full((), wanted))
    x = ((places - centres[:, None]) / (2 * longer)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(dim=1, keepdim=True)


def _scores(codec: Codec, answer: Tensor) -> Tensor:
    """Give the share of each class in each pixel. Shapes: answer [B, 3, h, w] -> [B, K, h, w]."""
    shown = torch.from_numpy(codec.paint(np.array([codec.colours], np.uint8))[0])
    palette = shown.to(answer) / 127.5 - 1
    difference = answer.clamp(-1, 1)[:, None] - palette[..., None, None]
    return torch.softmax(-difference.square().sum(dim=2) / SCORE_WIDTH, dim=1)


def _in_colours(codec: Codec, classes: Tensor) -> Tensor:
    """Give classes as the files have them. Shapes: classes [B, H, W]; result uint8 [B, H, W, 3]."""
    return torch.tensor(codec.colours, dtype=torch.uint8, device=classes.device)[classes]


def _default_noise(recipe: Recipe) -> dict[str, np.ndarray]:
    return {"noise": seeded_noises(recipe, 1)} if recipe.noise == "seeded" else {}


def _require_small(program: Program, path: Path) -> None:
    if program.size_bytes > LARGEST_INLINE_BYTES:
        raise EngineError(
            f"{path} cannot be one file: the weights have {program.size_bytes / 1e9:.1f} GB, and "
            "an ONNX file holds 2. Export a bundle: leave out --single-file."
        )


def _judge(eager: Predictor, runner: Runner) -> Iterator[BuildStep]:
    """Answer pictures both ways and require the same. Raises: EngineError."""
    started, codec = time.perf_counter(), eager.recipe.codec
    figures, differences = [], []
    for pictures in _draw_pictures(eager.recipe.size):
        expected = np.stack([with_channels(a) for a in answer_images(eager, list(pictures))])
        found = runner({"image": pictures})
        figures.append(compare({"answer": expected}, found))
        differences.append(_differences(expected, found["answer"]))
    _require_same(np.concatenate(differences), codec, than="than PyTorch")
    seconds = time.perf_counter() - started
    yield BuildStep(role=ANSWER, stage="parity", seconds=seconds, parity=worst(figures))


def _judge_by_metric(eager: Predictor, runner: Runner, pairs: Pairs) -> Iterator[BuildStep]:
    """Answer pairs both ways and require that the file's answers are as good. Raises: EngineError.

    In fewer bits some pixels at outlines change; how many may do so, the task's metric says. What
    else is in a batch must change nothing.
    """
    started = time.perf_counter()

    def answer(image: Pixels) -> Pixels:
        found: Pixels = runner({"image": image[None]})["answer"][0]
        return found

    quality = judge_answers(eager, [answer(image) for image, _ in pairs], pairs)
    for pictures in _draw_pictures(eager.recipe.size):
        together = runner({"image": pictures})
        alone = np.stack([answer(picture) for picture in pictures])
        compare({"answer": alone}, together)  # for the shape
        differences = _differences(alone, together["answer"])
        _require_same(differences, eager.recipe.codec, than="than to each image alone")
    seconds = time.perf_counter() - started
    yield BuildStep(role=ANSWER, stage="quality", seconds=seconds, quality=quality)


def _differences(expected: Pixels, found: Pixels) -> NDArray[np.int_]:
    """Give by how many levels each pixel differs, at most. Shapes: uint8 [B, H, W, 3]; flat."""
    levels: NDArray[np.int_] = np.abs(expected.astype(int) - found).max(axis=-1).ravel()
    return levels


def _require_same(differences: NDArray[np.int_], codec: Codec, *, than: str) -> None:
    """Require that few pixels differ; in pictures, by one level. Raises: EngineError."""
    changed, most = float((differences > 0).mean()), int(differences.max())
    if changed > MOST_CHANGED or (most > 1 and not codec.colours):
        raise EngineError(
            f"the file answers otherwise {than}: {changed:.1%} of the pixels differ, by up "
            f"to {most} of 255, and {MOST_CHANGED:.0%} may{'' if codec.colours else ', by 1'}. "
            "Export a bundle: leave out --single-file."
        )


def _draw_pictures(size: tuple[int, int]) -> Iterator[Pixels]:
    """Draw pictures as large as the model sees them, larger, and as thin as can be.

    Each has smooth shades, and a block of others with sharp edges. Shapes: uint8 [B, H, W, 3].
    """
    rng = np.random.default_rng(0)
    height, width = size
    for count, h, w in ((2, height, width), (1, height + 41, 2 * width - 3), (3, height, 1)):
        coarse = rng.standard_normal((3 * count, 4, 4), np.float32)
        shades = resize_array(coarse, (h, w)).reshape(count, 3, h, w)
        shades[..., h // 4 : h // 2, w // 3 : w // 2 + 1] *= -1
        yield to_uint8(shades.transpose(0, 2, 3, 1))

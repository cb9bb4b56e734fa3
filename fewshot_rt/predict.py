"""Answer a folder of images: threads read and write, the model answers in batches between them.

Axes: B batch, H W pixels.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, FewshotError, ModelError
from .images import Pixels, find_images, read_image, to_model, write_image
from .predictor import Predictor
from .tiles import Tiling, answer_tiled

THREADS = 4
AHEAD = 3  # batches read before they are needed


@dataclass(frozen=True)
class Job:
    """One image to answer, and where its answer goes."""

    source: Path
    answer: Path


@dataclass(frozen=True)
class Answered:
    """What became of one image. status: "done", "kept" (it was there) or "failed"."""

    job: Job
    status: str
    error: str = ""


@dataclass(frozen=True)
class _Loaded:
    """An image as its way wants it, and its own size (H, W)."""

    values: NDArray[Any]
    size: tuple[int, int]


class _Way(Protocol):
    """How images become answers: loaded and finished by threads, answered a few at a time."""

    @property
    def images(self) -> int:
        """Say how many images are answered at once."""

    def load(self, pixels: Pixels) -> _Loaded:
        """Make an image ready. Shapes: uint8 [H, W, 3]."""

    def answer(self, loaded: list[_Loaded]) -> list[Callable[[], Pixels]]:
        """Run the model; give what is left to do to each answer."""


@dataclass(frozen=True)
class _Whole:
    """Every image is resized to the model's size, and its answer back."""

    predictor: Predictor

    @property
    def images(self) -> int:
        return self.predictor.recipe.batch

    def load(self, pixels: Pixels) -> _Loaded:
        height, width = pixels.shape[:2]
        return _Loaded(to_model(pixels, self.predictor.recipe.size), (height, width))

    def answer(self, loaded: list[_Loaded]) -> list[Callable[[], Pixels]]:
        answers = self.predictor.answer(np.stack([item.values for item in loaded]))
        decode = self.predictor.recipe.codec.decode
        return [partial(decode, a, item.size) for a, item in zip(answers, loaded, strict=True)]


@dataclass(frozen=True)
class _Tiled:
    """Every image is answered by windows, which fill the batches: one image at a time."""

    predictor: Predictor
    tiling: Tiling
    images: int = 1

    def load(self, pixels: Pixels) -> _Loaded:
        height, width = pixels.shape[:2]
        return _Loaded(pixels, (height, width))

    def answer(self, loaded: list[_Loaded]) -> list[Callable[[], Pixels]]:
        answers = [answer_tiled(self.predictor, i.values, tiling=self.tiling) for i in loaded]
        return [partial(np.asarray, answer) for answer in answers]


def plan(source: Path, out: Path) -> list[Job]:
    """List the images of a folder (or one image) and where their answers go.

    An answer has the relative name of its image with the suffix .png; where two images differ only
    in their suffix, the whole name is kept (a.jpg.png). Images inside `out` are left alone.
    Raises: DataError if there is no image, if an answer would replace an image or come to lie
    outside `out`, or if two answers would have one name.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist. Give an image or a folder of images.")
    home = source.parent if source.is_file() else source
    if out.resolve() == home.resolve():
        raise DataError(f"{out} holds the images themselves. Give another --out for the answers.")
    images = [source] if source.is_file() else _images(source, out)
    names = [path.relative_to(home) for path in images]
    taken = Counter(_folded(name.with_suffix(".png")) for name in names)
    jobs = []
    for path, name in zip(images, names, strict=True):
        answer = name.with_suffix(".png")
        if taken[_folded(answer)] > 1:
            answer = name.with_name(f"{name.name}.png")
        jobs.append(Job(path, _inside(out, out / answer)))
    _require_unique(jobs)
    return jobs


def _images(source: Path, out: Path) -> list[Path]:
    apart = out.resolve()
    images = find_images(source)
    if source.resolve() in apart.parents:
        images = [path for path in images if apart not in path.resolve().parents]
    if not images:
        raise DataError(f"{source} holds no images (png, jpg, webp, bmp, tif).")
    return images


def _require_unique(jobs: list[Job]) -> None:
    first: dict[str, Job] = {}
    for job in jobs:
        other = first.setdefault(_folded(job.answer), job)
        if other is not job:
            raise DataError(
                f"{other.source} and {job.source} would both be answered as {job.answer}. "
                "Rename one."
            )


def _folded(path: Path) -> str:
    """Give a name under which some systems take two paths for one."""
    return str(path).casefold()


def predict(
    predictor: Predictor,
    jobs: Iterable[Job],
    *,
    overwrite: bool = False,
    tiling: Tiling | None = None,
) -> Iterator[Answered]:
    """Answer images and write the answers, yielding each as it is settled.

    An answer that is there is kept unless `overwrite`. An image that cannot be read or an answer
    that cannot be written is yielded as failed, and the rest goes on.

    tiling: answer by windows at each image's own resolution, as `answer_tiled` does; without it,
    images are resized to the model's size.
    """
    way = _way(predictor, tiling)
    todo = iter(jobs)
    waiting: deque[tuple[list[Job], list[Future[_Loaded]]]] = deque()
    writing: deque[tuple[Job, Future[None]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            while True:
                while len(waiting) < AHEAD:
                    batch, kept = _next_batch(todo, way.images, overwrite=overwrite)
                    yield from (Answered(job, "kept") for job in kept)
                    if not batch:
                        break
                    waiting.append((batch, [pool.submit(_load, way, job) for job in batch]))
                if not waiting:
                    break
                yield from _answer_batch(way, *waiting.popleft(), pool, writing)
                yield from _settled(writing, leave=2 * way.images)
            yield from _settled(writing, leave=0)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def answer_images(
    predictor: Predictor, images: Sequence[Pixels], *, tiling: Tiling | None = None
) -> list[Pixels]:
    """Answer images in memory, each at its own size, in batches.

    tiling: as for `predict`.
    Shapes: images uint8 [H, W, 3]; results uint8 [H, W] or [H, W, 3], as the codec writes them.
    """
    way = _way(predictor, tiling)
    answers: list[Pixels] = []
    for start in range(0, len(images), way.images):
        loaded = [way.load(pixels) for pixels in images[start : start + way.images]]
        answers += [finish() for finish in way.answer(loaded)]
    return answers


def _way(predictor: Predictor, tiling: Tiling | None) -> _Way:
    return _Whole(predictor) if tiling is None else _Tiled(predictor, tiling)


def _next_batch(todo: Iterator[Job], count: int, *, overwrite: bool) -> tuple[list[Job], list[Job]]:
    """Take jobs up to a full batch; give those to do, and those whose answer is kept."""
    batch: list[Job] = []
    kept: list[Job] = []
    while len(batch) < count:
        taken = list(islice(todo, 1))
        if not taken:
            break
        is_kept = taken[0].answer.exists() and not overwrite
        (kept if is_kept else batch).append(taken[0])
    return batch, kept


def _load(way: _Way, job: Job) -> _Loaded:
    return way.load(read_image(job.source))


def _answer_batch(
    way: _Way,
    batch: list[Job],
    reads: "list[Future[_Loaded]]",
    pool: ThreadPoolExecutor,
    writing: "deque[tuple[Job, Future[None]]]",
) -> Iterator[Answered]:
    loaded: list[_Loaded] = []
    ready: list[Job] = []
    for job, read in zip(batch, reads, strict=True):
        try:
            loaded.append(read.result())
            ready.append(job)
        # The border of one image: whatever is wrong with it, the others go on.
        except (FewshotError, OSError, ValueError, MemoryError) as error:
            yield Answered(job, "failed", str(error))
    if not loaded:
        return
    try:
        finishes = way.answer(loaded)
    except ModelError as error:
        yield from (Answered(job, "failed", str(error)) for job in ready)
        return
    for job, finish in zip(ready, finishes, strict=True):
        writing.append((job, pool.submit(_write, job, finish)))


def _write(job: Job, finish: Callable[[], Pixels]) -> None:
    write_image(job.answer, finish())


def _settled(writing: "deque[tuple[Job, Future[None]]]", *, leave: int) -> Iterator[Answered]:
    """Wait for answers to be written until only a few are under way."""
    while len(writing) > leave:
        job, write = writing.popleft()
        try:
            write.result()
        except (FewshotError, OSError, ValueError) as error:
            yield Answered(job, "failed", str(error))
        else:
            yield Answered(job, "done")


def _inside(out: Path, answer: Path) -> Path:
    """Require that an answer lies in `out` even where links lead elsewhere."""
    if out.resolve() not in answer.resolve().parents:
        raise DataError(f"{answer} leads out of {out} through a link. Give another --out.")
    return answer

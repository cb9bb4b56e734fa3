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

from .errors import ConfigError, DataError, FewshotError, ModelError
from .images import Pixels, find_images, read_image, to_model, write_image
from .predictor import Floats, Predictor, draw_noises
from .samples import FOLDER, decode_samples
from .tiles import Tiling, answer_tiled

THREADS = 4
AHEAD = 3  # batches read before they are needed


@dataclass(frozen=True)
class Job:
    """One image to answer, and where its answer goes; where its map of disagreement, if sampled."""

    source: Path
    answer: Path
    disagreement: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Name what is written."""
        return (self.answer,) if self.disagreement is None else (self.answer, self.disagreement)


@dataclass(frozen=True)
class Answered:
    """What became of one image. status: "done", "kept" (all was there) or "failed"."""

    job: Job
    status: str
    error: str = ""


@dataclass(frozen=True)
class _Loaded:
    """An image as its way wants it, and its own size (H, W)."""

    values: NDArray[Any]
    size: tuple[int, int]


# Gives the pixels of a job's files.
_Finish = Callable[[], tuple[Pixels, ...]]


class _Way(Protocol):
    """How images become answers: loaded and finished by threads, answered a few at a time."""

    @property
    def images(self) -> int:
        """Say how many images are answered at once."""

    def load(self, pixels: Pixels) -> _Loaded:
        """Make an image ready. Shapes: uint8 [H, W, 3]."""

    def answer(self, loaded: list[_Loaded]) -> list[_Finish]:
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

    def answer(self, loaded: list[_Loaded]) -> list[_Finish]:
        answers = self.predictor.answer(np.stack([item.values for item in loaded]))
        return [partial(self.decode, a, i.size) for a, i in zip(answers, loaded, strict=True)]

    def decode(self, answer: Floats, size: tuple[int, int]) -> tuple[Pixels, ...]:
        """Give the one file of an answer."""
        return (self.predictor.recipe.codec.decode(answer, size),)


@dataclass(frozen=True)
class _Sampled(_Whole):
    """The same from several noises: the mean answer, and the map of disagreement."""

    noises: Floats

    def answer(self, loaded: list[_Loaded]) -> list[_Finish]:
        images = np.stack([item.values for item in loaded])
        answers = self.predictor.answer_samples(images, self.noises)
        return [partial(self.decode, a, i.size) for a, i in zip(answers, loaded, strict=True)]

    def decode(self, answer: Floats, size: tuple[int, int]) -> tuple[Pixels, ...]:
        return decode_samples(self.predictor.recipe.codec, answer, size)


@dataclass(frozen=True)
class _Tiled:
    """Every image is answered by windows, which fill the batches: one image at a time."""

    predictor: Predictor
    tiling: Tiling
    images: int = 1

    def load(self, pixels: Pixels) -> _Loaded:
        height, width = pixels.shape[:2]
        return _Loaded(pixels, (height, width))

    def answer(self, loaded: list[_Loaded]) -> list[_Finish]:
        answers = [answer_tiled(self.predictor, i.values, tiling=self.tiling) for i in loaded]
        return [partial(tuple, [answer]) for answer in answers]


def plan(source: Path, out: Path, *, is_sampled: bool = False) -> list[Job]:
    """List the images of a folder (or one image) and where their answers go.

    An answer has the relative name of its image with the suffix .png; where two images differ only
    in their suffix, the whole name is kept (a.jpg.png). Images inside `out` are left alone.

    is_sampled: plan maps of disagreement too, in the folder "disagreement" of `out` under the names
        of the answers. A map is never given the name of another image's answer.
    Raises: DataError if there is no image, if a file would replace an image or come to lie outside
    `out`, or if two files would have one name.
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
        beside = _inside(out, out / FOLDER / answer) if is_sampled else None
        jobs.append(Job(path, _inside(out, out / answer), beside))
    _require_apart(jobs)
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


def _require_apart(jobs: list[Job]) -> None:
    images = {_folded(job.source.resolve()) for job in jobs}
    for path in (path for job in jobs for path in job.files):
        if _folded(path.resolve()) in images:
            raise DataError(f"{path} is one of the images. Give another --out for the answers.")


def _require_unique(jobs: list[Job]) -> None:
    first: dict[str, Job] = {}
    for job in jobs:
        for path in job.files:
            other = first.setdefault(_folded(path), job)
            if other is not job:
                raise DataError(
                    f"{other.source} and {job.source} would both be answered in {path}. Rename one."
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
    samples: int | None = None,
) -> Iterator[Answered]:
    """Answer images and write the answers, yielding each as it is settled.

    What a job writes is kept if all of it is there, unless `overwrite`. An image that cannot be
    read or an answer that cannot be written is yielded as failed, and the rest goes on.

    tiling: answer by windows at each image's own resolution, as `answer_tiled` does; without it,
    images are resized to the model's size.
    samples: answer from so many noises, and write what `decode_samples` makes of them; jobs must be
    planned with `is_sampled`.
    Raises: ConfigError if samples are taken by windows, are less than 2, or would all be alike.
    """
    way = _way(predictor, tiling, samples)
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
    way = _way(predictor, tiling, None)
    answers: list[Pixels] = []
    for start in range(0, len(images), way.images):
        loaded = [way.load(pixels) for pixels in images[start : start + way.images]]
        answers += [finish()[0] for finish in way.answer(loaded)]
    return answers


def _way(predictor: Predictor, tiling: Tiling | None, samples: int | None) -> _Way:
    if samples is not None:
        if tiling is not None:
            raise ConfigError("windows are not sampled: leave out the tiles or the samples.")
        return _Sampled(predictor, draw_noises(predictor.recipe, samples))
    return _Whole(predictor) if tiling is None else _Tiled(predictor, tiling)


def _next_batch(todo: Iterator[Job], count: int, *, overwrite: bool) -> tuple[list[Job], list[Job]]:
    """Take jobs up to a full batch; give those to do, and those that are kept."""
    batch: list[Job] = []
    kept: list[Job] = []
    while len(batch) < count:
        taken = list(islice(todo, 1))
        if not taken:
            break
        is_kept = not overwrite and all(path.exists() for path in taken[0].files)
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


def _write(job: Job, finish: _Finish) -> None:
    finished = finish()
    # An old map must not pass for that of the new answer if this is interrupted in between.
    if job.disagreement is not None:
        job.disagreement.unlink(missing_ok=True)
    for path, pixels in zip(job.files, finished, strict=True):
        write_image(path, pixels)


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

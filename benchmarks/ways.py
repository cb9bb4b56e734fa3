"""Ways to answer a run's images, each in a process of its own, as its users meet it.

In one process they would share cores with each other's threads: PyTorch's and ONNX Runtime's wait
for more work for a while, busily, and OpenVINO's took up to 1.7 times as long beside them.
"""

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewshot_rt.errors import EngineError, FewshotError

if TYPE_CHECKING:
    from fewshot_rt.predictor import Floats

    from .plain import Answer

PLAIN, EAGER = "plain", "eager"


def open_way(place: Path, name: str, *, batch: int) -> "Answer":
    """Open a way to answer: "plain" and "eager" PyTorch, or a bundle of the run by name.

    Raises: ModelError and the like if it cannot be opened.
    """
    if name == PLAIN:
        return _open_plain(place, batch)
    if name == EAGER:
        from fewshot_rt.runs import base_predictor, open_merged

        merged, _, values = open_merged(place)
        recipe = replace(values["recipe"], batch=batch)
        return base_predictor(merged, recipe, values["prompt"], origin=EAGER).answer
    from fewshot_rt.export.bundle import open_bundle

    return open_bundle(place / "bundles" / name).with_recipe(batch=batch).answer


def _open_plain(place: Path, batch: int) -> "Answer":
    """Open the loop that one would write with diffusers, the adapter attached."""
    from fewshot_rt.adapter import Adapter
    from fewshot_rt.bases import open_base
    from fewshot_rt.runs import open_merged

    from .plain import plain_loop

    _, _, values = open_merged(place)
    train = values["train"]
    base = open_base(train["base"], weights="fp32", vae=train.get("vae"))
    Adapter.load(place).attach(base)
    recipe = replace(values["recipe"], batch=batch)
    return plain_loop(base, prompt=values["prompt"], recipe=recipe, decode=base.decode)


class Apart:
    """A way to answer in a process of its own, which ends with `close`.

    make: opens it there; it must be possible to pickle it.
    Raises: the FewshotError with which it cannot be opened or does not answer; EngineError if its
    process ends.
    """

    def __init__(self, make: "Callable[[], Answer]") -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def __call__(self, images: "Floats") -> "Floats":
        """Answer. Shapes: images, result [B, 3, H, W]."""
        self._pipe.send(images)
        answers: Floats = self._receive()
        return answers

    def again(self) -> None:
        """Answer the same images once more; the answers stay there."""
        self._pipe.send(None)
        self._receive()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            found = self._pipe.recv()
        except EOFError as error:
            self._process.join()
            status = self._process.exitcode
            raise EngineError(f"its process ended with status {status}.") from error
        if isinstance(found, FewshotError):
            raise found
        return found


def _serve(pipe: Connection, make: "Callable[[], Answer]") -> None:
    """Answer what comes, until nothing can come any more."""
    images: Any = None
    with suppress(EOFError, BrokenPipeError):
        try:
            answer = make()
            pipe.send(None)
            while True:
                given = pipe.recv()
                images = images if given is None else given
                answers = answer(images)
                pipe.send(None if given is None else answers)
        except FewshotError as error:
            pipe.send(error)

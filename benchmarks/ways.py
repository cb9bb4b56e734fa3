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
    from fewshot_rt.runs import open_exact

    from .plain import plain_loop

    base, adapter, values = open_exact(place)
    adapter.attach(base)
    recipe = replace(values["recipe"], batch=batch)
    return plain_loop(base, prompt=values["prompt"], recipe=recipe, decode=base.decode)


class Apart:
    """A way to answer in a process of its own, which ends with `close`.

    name: of the way, for messages. make: opens it there; it must be possible to pickle it.
    Raises: the FewshotError with which it cannot be opened or does not answer; EngineError if its
    process ends.
    """

    def __init__(self, name: str, make: "Callable[[], Answer]") -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._wait(lambda: None)

    def __call__(self, images: "Floats") -> "Floats":
        """Answer. Shapes: images, result [B, 3, H, W]."""
        answers: Floats = self._wait(lambda: self._pipe.send(images))
        return answers

    def again(self) -> None:
        """Answer the same images once more; the answers stay there."""
        self._wait(lambda: self._pipe.send(None))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _wait(self, ask: Callable[[], None]) -> Any:
        """Ask for something, and give what comes back."""
        try:
            ask()
            found = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise EngineError(
                f"{self._name}: its process ended with status {self._process.exitcode}. What it "
                "printed says why; measure the others without it."
            ) from error
        if isinstance(found, FewshotError):
            self.close()
            raise found
        return found


def _serve(pipe: Connection, make: "Callable[[], Answer]") -> None:
    """Answer what comes, until nothing can come any more."""
    images: Any = None
    with suppress(EOFError, ConnectionError):
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

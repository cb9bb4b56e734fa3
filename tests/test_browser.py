"""The browser example, driven in headless Chromium.

Reference: the ONNX bundle of the same run, answered from Python on this machine's processor.
"""

import base64
import io
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from fewshot_rt.codecs import Codec
from fewshot_rt.export.bundle import open_bundle
from fewshot_rt.export.single import export_single
from fewshot_rt.images import Pixels, write_image
from fewshot_rt.predict import answer_images
from fewshot_rt.predictor import Predictor
from fewshot_rt.runs import open_exact

playwright = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven with the package 'playwright'"
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm for onnxruntime-web"),
]

EXAMPLE = Path(__file__).parents[1] / "examples" / "browser"
LEFT_OUT = shutil.ignore_patterns("node_modules", "*.onnx")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH")
SIZE = (45, 61)
BUNDLE = Path("runs/one/bundles/onnx-fp32")
# What a browser has and Node.js has not, around the JavaScript of the README.
AROUND = """
import { readFileSync, writeFileSync } from "node:fs";
globalThis.ImageData = class {
    constructor(data, width, height) { Object.assign(this, {data, width, height}); }
};
const { answerImage } = await import("./answer.mjs");
const data = new Uint8ClampedArray(readFileSync("image.raw"));
writeFileSync("answer.raw", (await answerImage({data, width: 61, height: 45})).data);
process.exit(0);
"""
PIXELS = """canvas => {
    const {width, height} = canvas;
    const {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
    return [height, width, Array.from(data)];
}"""
DROP = """([name, type, text]) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([bytes], name, {type}));
    const target = document.querySelector(".drop");
    target.dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
}"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its packages, and no model."""
    folder = tmp_path_factory.mktemp("browser") / "site"
    shutil.copytree(EXAMPLE, folder, ignore=LEFT_OUT)
    result = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if any(code in result.stderr for code in UNREACHABLE):
        pytest.skip("the npm registry, where onnxruntime-web comes from, cannot be reached")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def model(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Predictor]:
    """A short training's one file, and its bundle; both answer in pictures."""
    path = tmp_path_factory.mktemp("model") / "squares.onnx"
    write_model(workshop, path)
    bundle = open_bundle(workshop / BUNDLE, threads=1)
    return path, bundle.with_recipe(codec=Codec("rgb"))


def write_model(workshop: Path, path: Path, **way: Any) -> None:
    """Write the run's one file. way: precision, and pairs for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        base, adapter, values = open_exact(Path("runs/one"))
    codec, metrics = Codec("rgb"), ("mae",)
    recipe = open_bundle(workshop / BUNDLE).with_recipe(codec=codec, metrics=metrics).recipe
    shared = {"recipe": recipe, "prompt": values["prompt"], "origin": {"run": "one"}}
    assert list(export_single(base, path=path, adapter=adapter, **shared, **way))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, site: Path) -> Iterator[Any]:
    """The page, with nothing given yet; it asks nobody else for anything."""
    opened, asked = browser.new_page(), []
    opened.on("request", lambda request: asked.append(request.url))
    with served(site) as address:
        opened.goto(address)
        settle(opened)
        yield opened
        opened.close()
    assert asked
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


def settle(page: Any) -> None:
    """Wait until all that was given is done."""
    page.wait_for_function("document.body.ariaBusy === 'false'")


def give(page: Any, kind: str, *files: Path) -> None:
    """Choose files. kind: "model" or "images"."""
    page.set_input_files(f"#{kind}", files)
    settle(page)


def drop(page: Any, path: Path) -> None:
    text = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(DROP, [path.name, "image/png", text])
    settle(page)


def pixels_of(page: Any, part: str) -> Pixels:
    """Read what a canvas of the first card shows. Shapes: uint8 [H, W, 4]."""
    height, width, data = page.locator(f"article canvas.{part}").first.evaluate(PIXELS)
    return np.array(data, np.uint8).reshape(height, width, 4)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A picture of an odd size, with smooth colours and a sharp edge."""
    coarse = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    pixels = np.array(smooth)
    pixels[10:30, 20:41] = 255 - pixels[10:30, 20:41]
    write_image(tmp_path / "my picture.v2.png", pixels)
    return tmp_path / "my picture.v2.png"


def check_answer(page: Any, image: Path, bundle: Predictor) -> None:
    given = np.asarray(Image.open(image))
    np.testing.assert_array_equal(pixels_of(page, "image")[..., :3], given)
    check_pixels(pixels_of(page, "answer"), given, bundle)


def check_pixels(found: Pixels, given: Pixels, bundle: Predictor) -> None:
    """Compare an answer in RGBA with a bundle's."""
    (expected,) = answer_images(bundle, [given])
    assert (found[..., 3] == 255).all()
    difference = np.abs(expected.astype(int) - found[..., :3])
    assert np.std(expected) > 5
    # As the file itself may: see `MOST_CHANGED`.
    assert difference.max() <= 1
    assert (difference.max(axis=-1) > 0).mean() <= 0.01


def test_a_chosen_image_is_answered_as_from_python(
    page: Any, model: tuple[Path, Predictor], image: Path
) -> None:
    give(page, "model", model[0])
    give(page, "images", image)
    check_answer(page, image, model[1])
    assert page.locator("article .name").inner_text() == image.name
    note = page.locator("article .note").inner_text()
    assert note.startswith("61x45, ")
    assert note.endswith(" ms")
    with page.expect_download() as waiting:
        page.get_by_role("link", name=f"Download the answer to {image.name}").click()
    assert waiting.value.suggested_filename == "my picture.v2-answer.png"
    downloaded = Image.open(io.BytesIO(Path(waiting.value.path()).read_bytes())).convert("RGBA")
    np.testing.assert_array_equal(np.asarray(downloaded), pixels_of(page, "answer"))


def test_a_file_in_int8_is_answered_as_from_python(
    page: Any, workshop: Path, image: Path, tmp_path: Path
) -> None:
    path, pixels = tmp_path / "int8.onnx", np.asarray(Image.open(image))
    write_model(workshop, path, precision="int8", pairs=[(pixels, 255 - pixels)])
    give(page, "model", path)
    give(page, "images", image)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"image": pixels[None]})[0]
    difference = np.abs(expected.astype(int) - pixels_of(page, "answer")[..., :3])
    # A sum in another order rounds to another of 256 levels in places, and so on from there.
    assert np.std(expected) > 5
    assert difference.max() <= 3
    assert (difference.max(axis=-1) > 1).mean() <= 0.01


def test_what_is_dropped_is_answered_in_the_order_given(
    page: Any, model: tuple[Path, Predictor], image: Path, tmp_path: Path
) -> None:
    drop(page, model[0])
    assert page.locator("#task").inner_text() == model[1].recipe.task
    about = page.locator("#about").inner_text()
    assert about.startswith("rgb · base tiny (that of tiny) · sees 32x32 pixels · ")
    drop(page, image)
    check_answer(page, image, model[1])
    others = [tmp_path / f"{name}.png" for name in "ab"]
    for other in others:
        shutil.copy(image, other)
    give(page, "images", *others)
    assert page.locator("article .name").all_inner_texts() == ["a.png", "b.png", image.name]
    screen = Image.open(io.BytesIO(page.screenshot()))
    assert len(screen.getcolors(1 << 24)) > 100  # pictures are on it


def test_a_model_beside_the_page_is_taken_at_once(
    page: Any, site: Path, model: tuple[Path, Predictor]
) -> None:
    assert page.locator("#task").inner_text() == "No model yet"
    beside = site / "model.onnx"
    try:
        shutil.copy(model[0], beside)
        page.reload()
        settle(page)
        assert page.locator("#task").inner_text() == model[1].recipe.task
    finally:
        beside.unlink()


def test_what_is_of_no_use_is_told(
    page: Any, model: tuple[Path, Predictor], image: Path, workshop: Path, tmp_path: Path
) -> None:
    give(page, "images", image)
    assert "there is no model yet. Choose one" in page.locator(".note").first.inner_text()
    status = page.locator("#status")
    cut, text, part = (tmp_path / f"{name}.onnx" for name in ("cut", "text", "part"))
    cut.write_bytes(model[0].read_bytes()[:1000])
    text.write_text("no model at all")
    shutil.copy(workshop / "runs" / "one" / "bundles" / "onnx-fp32" / "encoder.onnx", part)
    for path, said in (
        (cut, "cut.onnx cannot be used: it is no ONNX file, or only the beginning of one."),
        (text, "text.onnx cannot be used: it is no ONNX file, or only the beginning of one."),
        (part, "part.onnx cannot be used: it is one part of a bundle (encoder), not the whole."),
    ):
        give(page, "model", path)
        assert status.inner_text() == said
        assert "is-wrong" in status.get_attribute("class")
    give(page, "model", model[0])
    assert status.inner_text() == "Ready."
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    give(page, "images", broken, image)
    notes = page.locator(".note").all_inner_texts()
    assert notes[0] == "No answer: this is no image that the browser can read."
    assert notes[1].endswith(" ms")


def test_the_keyboard_reaches_everything(page: Any) -> None:
    reached = []
    for _ in range(2):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["model", "images"]
    for name in reached:
        with page.expect_file_chooser():
            page.locator(f"#{name}").focus()
            page.keyboard.press("Enter")


def test_packages_that_are_not_there_are_told(
    browser: Any, tmp_path: Path, model: tuple[Path, Predictor]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(EXAMPLE, bare, ignore=LEFT_OUT)
    opened = browser.new_page()
    with served(bare) as address:
        opened.goto(address)
        settle(opened)
        give(opened, "model", model[0])
        said = opened.locator("#status").inner_text()
        opened.close()
    assert said.endswith("onnxruntime-web is not there. Run npm install in this folder.")


def test_the_javascript_of_the_readme_runs(
    site: Path, model: tuple[Path, Predictor], image: Path
) -> None:
    section = (Path(__file__).parents[1] / "README.md").read_text().split("## One file")[1]
    code = section.split("```javascript\n")[1].split("```")[0]
    place, pixels = site / "snippet", np.asarray(Image.open(image))
    place.mkdir()
    shutil.copy(model[0], place / "model.onnx")
    (place / "answer.mjs").write_text(code)
    (place / "around.mjs").write_text(AROUND)
    (place / "image.raw").write_bytes(np.dstack([pixels, np.full(SIZE, 255, np.uint8)]).tobytes())
    subprocess.run(["node", "around.mjs"], cwd=place, check=True, capture_output=True)
    found = np.frombuffer((place / "answer.raw").read_bytes(), np.uint8).reshape(*SIZE, 4)
    check_pixels(found, pixels, model[1])

"""Adapters that change under compiled code.

References: PEFT's merge; the closed form of a low-rank update; the engine's own answers before.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import bundles
from tiny.bundles import draw_adapter, eager_predictor, pictures
from torch import Tensor

from fewshot_rt.errors import ConfigError, EngineError, ModelError
from fewshot_rt.export.adapters import live_of, read_updates, updates_of, write_updates
from fewshot_rt.export.build import add_adapter, export_bundle
from fewshot_rt.export.bundle import open_bundle, read_manifest
from fewshot_rt.export.forms import FORMS, derive
from fewshot_rt.export.lifted import Weight
from fewshot_rt.export.live import LiveWeights, Update, compact
from fewshot_rt.export.parity import compare, require
from fewshot_rt.predictor import Recipe

RECIPE = replace(bundles.RECIPE, batch=2)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def update(*shape: int, seed: int, rank: int = 2) -> Update:
    return Update(draw(rank, shape[1], seed=seed), draw(shape[0], rank, seed=seed + 1), 0.5)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_updates_come_and_go_without_a_trace(form: str) -> None:
    sources = {"a": draw(16, 32, seed=0).bfloat16(), "b": draw(16, 32, seed=1)}
    live = LiveWeights(sources.__getitem__, [Weight("a", form), Weight("b", form)])
    places = {weight: tensor.data_ptr() for weight, tensor in live.tensors.items()}
    before = {weight: tensor.clone() for weight, tensor in live.tensors.items()}
    one, two = update(16, 32, seed=2), update(16, 32, seed=4)
    live.use({"a": one})
    merged = sources["a"].float() + 0.5 * (one.up @ one.down)
    assert equal(live.tensors[Weight("a", form)], derive(merged, form))
    assert equal(live.tensors[Weight("b", form)], before[Weight("b", form)])
    live.use({"b": two})
    assert equal(live.tensors[Weight("a", form)], before[Weight("a", form)])
    assert not equal(live.tensors[Weight("b", form)], before[Weight("b", form)])
    live.use({})
    assert all(equal(live.tensors[weight], before[weight]) for weight in before)
    # Compiled code, and CUDA graphs, keep the places.
    assert {weight: tensor.data_ptr() for weight, tensor in live.tensors.items()} == places


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one.float(), other.float())


def test_an_adapter_that_does_not_fit_changes_nothing() -> None:
    sources = {"a": draw(4, 6, seed=0), "b": draw(4, 6, seed=1)}
    live = LiveWeights(sources.__getitem__, map(Weight, sources))
    before = {weight: tensor.clone() for weight, tensor in live.tensors.items()}
    for name, shape, message in (
        ("c", (4, 6), "changes c, which this bundle does not have"),
        ("b", (4, 5), r"b is \[4, 5\], and this bundle's is \[4, 6\]"),
    ):
        with pytest.raises(ModelError, match=message):
            live.use({"a": update(4, 6, seed=3), name: update(*shape, seed=5)})
        assert all(equal(live.tensors[weight], before[weight]) for weight in before)


def test_a_convolution_is_updated_as_its_matrix() -> None:
    source = draw(4, 3, 1, 2, 2, seed=0)
    live = LiveWeights(lambda _: source, [Weight("a")])
    down, up = draw(2, 3, 1, 2, 2, seed=1), draw(4, 2, 1, 1, 1, seed=2)
    live.use({"a": Update(down, up, 1.0)})
    expected = source + torch.einsum("nr,rcthw->ncthw", up[:, :, 0, 0, 0], down)
    torch.testing.assert_close(live.tensors[Weight("a")], expected)


def test_weights_are_kept_in_half_the_bits_where_nothing_is_lost() -> None:
    fine = draw(8, 8, seed=0)
    assert compact(fine).dtype is torch.float32
    assert compact(fine.bfloat16().float()).dtype is torch.bfloat16
    assert compact(fine.half().float()).dtype is torch.float16
    assert compact(torch.arange(3)).dtype is torch.int64


def test_updates_are_read_as_they_were_written(tmp_path: Path) -> None:
    given = {"x.weight": update(4, 6, seed=0), "y.weight": update(5, 3, seed=7)}
    write_updates(tmp_path / "a.safetensors", given)
    found = read_updates(tmp_path / "a.safetensors")
    assert set(found) == set(given)
    for name, one in given.items():
        assert torch.equal(found[name].down, one.down)
        assert torch.equal(found[name].up, one.up)
        assert found[name].scale == one.scale
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="is damaged"):
        read_updates(tmp_path / "a.safetensors")


def bundle_of(make: Callable[..., Any], folder: Path, engine: str, precision: str) -> Path:
    """A bundle with the adapters one and two; two answers in one step, from zeros."""
    settings = {"folder": folder, "origin": {}}
    for number, (name, recipe) in enumerate({"one": RECIPE, "two": SECOND}.items()):
        base = make(layers=3)
        adapter = name, draw_adapter(make(layers=3), seed=number)
        shared: Any = {"recipe": recipe, "prompt": base.embed("mask"), **settings}
        if number:
            list(add_adapter(base, adapter, **shared))
        else:
            shared |= {"engine": engine, "precision": precision}
            list(export_bundle(base, adapter=adapter, **shared))
    return folder


SECOND = replace(RECIPE, steps=1, noise="zero")


@pytest.fixture(scope="module", params=[("aoti", "fp32"), ("inductor", "int8")])
def bundle(
    request: Any, make_tiny_base: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    engine, precision = request.param
    folder = tmp_path_factory.mktemp("live") / f"{engine}-{precision}"
    return bundle_of(make_tiny_base, folder, engine, precision), precision


def test_each_adapter_answers_as_if_it_were_merged(
    bundle: tuple[Path, str], make_tiny_base: Callable[..., Any]
) -> None:
    folder, precision = bundle
    predictor = open_bundle(folder)
    assert list(predictor.adapters) == ["one", "two"]
    answers = {}
    for number, (name, recipe) in enumerate({"one": RECIPE, "two": SECOND}.items()):
        base = make_tiny_base(layers=3)
        draw_adapter(make_tiny_base(layers=3), seed=number).merge(base)
        predictor.use(name)
        assert predictor.recipe == recipe
        answers[name] = predictor.answer(pictures(2))
        expected = {"image": eager_predictor(base, recipe).answer(pictures(2))}
        require(compare(expected, {"image": answers[name]}), role=name, tolerance=precision)
    difference = compare({"x": answers["one"]}, {"x": answers["two"]})["x"].rel_l2
    assert difference > 5 * {"fp32": 1e-5, "int8": 2e-2}[precision]
    manifest = read_manifest(folder)
    assert set(manifest["adapters"]) == {"one", "two"}
    assert manifest["adapters"]["two"]["parity"]["answer"]["image"]["rel_l2"] > 0


def test_twenty_changes_leave_no_trace_and_compile_nothing(
    bundle: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, base = open_bundle(bundle[0]), open_bundle(bundle[0])
    first = {}
    for name in ("one", "two"):
        predictor.use(name)
        first[name] = predictor.answer(pictures(2))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something is compiled")

    for place in ("compile_fx.compile_fx", "compile_fx.compile_fx_inner"):
        monkeypatch.setattr(f"torch._inductor.{place}", refuse)
    for number in range(20):
        name = ("one", "two")[number % 2]
        predictor.use(name)
        np.testing.assert_array_equal(predictor.answer(pictures(2)), first[name])
        # Fewer images than a batch, and other steps: the same code.
        predictor.with_recipe(steps=1, noise="zero").answer(pictures(1))
    live_of(predictor.runners["denoiser"]).use({})
    live_of(base.runners["denoiser"]).use({})
    for weight, tensor in live_of(base.runners["denoiser"]).tensors.items():
        assert equal(tensor, live_of(predictor.runners["denoiser"]).tensors[weight])


def test_what_does_not_belong_is_refused(
    bundle: tuple[Path, str], make_tiny_base: Callable[..., Any]
) -> None:
    folder, _ = bundle
    with pytest.raises(ConfigError, match=r"unknown adapter 'tow'\. Did you mean 'two'"):
        open_bundle(folder).use("tow")
    before = sorted(path.name for path in folder.iterdir())

    def add(name: str, recipe: Recipe = RECIPE, **origin: str) -> None:
        base = make_tiny_base(layers=3)
        adapter = name, draw_adapter(make_tiny_base(layers=3), seed=5)
        prompt = base.embed("mask")
        list(add_adapter(base, adapter, recipe=recipe, prompt=prompt, folder=folder, origin=origin))

    with pytest.raises(ConfigError, match="has an adapter 'one' already"):
        add("one")
    with pytest.raises(ConfigError, match=r"must be one plain name, not '\.\./three'"):
        add("../three")
    with pytest.raises(ModelError, match="made for another size, number of frames, batch"):
        add("three", replace(RECIPE, batch=7))
    with pytest.raises(ModelError, match="the bundle has acceleration None"):
        add("three", acceleration="a file")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert set(read_manifest(folder)["adapters"]) == {"one", "two"}


def test_an_engine_with_weights_in_its_code_says_so(
    make_tiny_base: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_tiny_base()
    adapter = "one", draw_adapter(make_tiny_base(), seed=0)
    prompt = base.embed("mask")
    shared: Any = {"recipe": RECIPE, "prompt": prompt, "folder": tmp_path / "b", "origin": {}}
    list(export_bundle(base, engine="eager", precision="fp32", adapter=adapter, **shared))
    predictor = open_bundle(tmp_path / "b")
    expected = {
        "image": eager_predictor(base, RECIPE).answer(pictures(2))
    }  # it is merged into this base by now
    require(compare(expected, {"image": predictor.answer(pictures(2))}), role="", tolerance="fp32")
    assert not predictor.adapters
    with pytest.raises(EngineError, match="Export for 'aoti', 'inductor' or 'trt'"):
        live_of(predictor.runners["denoiser"])
    with pytest.raises(EngineError, match="Export for 'aoti', 'inductor' or 'trt'"):
        list(add_adapter(make_tiny_base(), ("two", adapter[1]), **shared))


def test_updates_are_those_that_peft_merges(make_tiny_base: Callable[..., Any]) -> None:
    base, adapter = make_tiny_base(), draw_adapter(make_tiny_base(), seed=3)
    weights = dict(base.denoiser().named_parameters())
    sources = {f"denoiser.{name}": value.detach().clone() for name, value in weights.items()}
    live = LiveWeights(sources.__getitem__, map(Weight, sources))
    updates = updates_of(adapter)
    live.use(updates)
    adapter.merge(base)
    merged = {f"denoiser.{name}": value for name, value in base.denoiser().named_parameters()}
    assert set(merged) == set(sources)
    changed = {n for n, value in merged.items() if not torch.equal(value, sources[n])}
    assert changed == set(updates)
    for name, value in merged.items():
        torch.testing.assert_close(live.tensors[Weight(name)], value.detach(), rtol=0, atol=1e-6)

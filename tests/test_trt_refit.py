"""Weights that adapters change in an engine of TensorRT: which they are there, and how they get in.

References: PEFT's merge, run by eager PyTorch. ONNX Runtime stands in for the engine, on the very
graph that TensorRT is given, with the weights set anew in it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny.bundles import draw_adapter
from tiny.trt import (
    FAMILIES,
    VERSION,
    OnnxEngine,
    answer,
    cut_role,
    freeze,
    open_family,
)

from fewshot_rt.errors import EngineError, ModelError
from fewshot_rt.export.adapters import read_updates, updates_of, write_updates
from fewshot_rt.export.live import Update
from fewshot_rt.export.onnx_trt import find_sites, put_plugin, read_model
from fewshot_rt.export.parity import TOLERANCES, compare, require
from fewshot_rt.export.program import Program
from fewshot_rt.export.trt_declare import Declared, declare
from fewshot_rt.export.trt_refit import (
    BASE,
    RefitWeights,
    Slot,
    digest,
    product_weights,
    read_answer,
    write_answer,
)
from fewshot_rt.roles import Role, run_eagerly

TINY: dict[str, Any] = {"frames": 5, "size": (32, 32), "word": "mask"}
Made = tuple[Program, Role, Declared]


def make(base: Any, folder: Path, precision: str, **sizes: Any) -> Made:
    program, module = freeze(base, "denoiser", **sizes)
    declared = declare(program, folder, precision=precision, examples=(), version=VERSION)
    return program, module, declared


def open_live(made: Made, precision: str, folder: Path) -> tuple[OnnxEngine, RefitWeights]:
    """Open a graph as an engine is opened: without its weights, and with what eager answers."""
    program, module, declared = made
    engine = OnnxEngine(declared.path, program.signature)
    engine.forget(slot.name for slot in declared.slots.values())
    given, expected = answer(module, program)
    write_answer(folder / "denoiser", BASE, expected)
    live = RefitWeights(
        lambda name: program.exported.state_dict[name].detach(),
        declared.slots,
        push=engine.push,
        answer=lambda: engine(given),
        answers=folder / "denoiser",
        tolerance=precision,
    )
    live.fill()
    return engine, live


@pytest.fixture(scope="module")
def made(
    make_tiny_base: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Made]:
    folder = tmp_path_factory.mktemp("fp32")
    return "fp32", make(make_tiny_base(layers=2), folder, "fp32", **TINY)


def updates_for(make_base: Callable[..., Any], seed: int) -> dict[str, Update]:
    return updates_of(draw_adapter(make_base(layers=2), seed))


def test_every_product_of_the_base_can_be_set(made: tuple[str, Made]) -> None:
    program, _, declared = made[1]
    products = product_weights(program)
    assert set(declared.slots) == set(products)
    assert {len(shape) for shape in products.values()} == {2, 5}
    assert {slot.is_transposed for slot in declared.slots.values()} == {True, False}


def test_an_adapter_answers_as_if_it_were_merged(
    made: tuple[str, Made], make_tiny_base: Callable[..., Any], tmp_path: Path
) -> None:
    precision, (program, _, _) = made
    engine, live = open_live(made[1], precision, tmp_path)
    given = program.signature.example(seed=8)
    base = engine(given)
    for seed in (1, 2):
        merged = make_tiny_base(layers=2)
        draw_adapter(make_tiny_base(layers=2), seed).merge(merged)
        live.use(updates_for(make_tiny_base, seed))
        module, signature = cut_role(merged, "denoiser", **TINY)
        expected = run_eagerly(module, signature, device=torch.device("cpu"))(given)
        require(compare(expected, engine(given)), role="denoiser", tolerance=precision)
        assert compare(base, expected)["prediction"].rel_l2 > 10 * TOLERANCES[precision]
    live.use({})
    # Weights go back to the last bit.
    np.testing.assert_array_equal(engine(given)["prediction"], base["prediction"])


def test_convolutions_are_set_as_well(made: tuple[str, Made], tmp_path: Path) -> None:
    precision, (program, module, declared) = made
    engine, live = open_live(made[1], precision, tmp_path)
    name, shape = next((n, s) for n, s in product_weights(program).items() if len(s) == 5)
    draw = torch.Generator().manual_seed(0)
    down = torch.randn(2, *shape[1:], generator=draw)
    up = torch.randn(shape[0], 2, 1, 1, 1, generator=draw)
    live.use({name: Update(down, up, 0.1)})
    parameter = module.get_parameter(name)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter += 0.1 * (up.flatten(1) @ down.flatten(1)).view(shape)
    given, expected = answer(module, program, seed=8)
    with torch.no_grad():
        parameter.copy_(before)
    require(compare(expected, engine(given)), role="denoiser", tolerance=precision)
    assert engine.pushed[-1] == [declared.slots[name].name]


def test_only_what_changes_is_set_and_what_the_engine_asks_for(
    made: tuple[str, Made], tmp_path: Path
) -> None:
    precision, (_, _, declared) = made
    engine, live = open_live(made[1], precision, tmp_path)
    assert set(engine.pushed[0]) == {slot.name for slot in declared.slots.values()}
    one, two, other = list(declared.slots)[-3:]
    places = {name: declared.slots[name].name for name in (one, two, other)}
    live.use({one: random_update(live, one)})
    live.use({two: random_update(live, two)})
    engine.needs = {places[two]: places[other]}
    live.use({})
    assert engine.pushed[1:] == [
        [places[one]],
        [places[one], places[two]],
        [places[two], places[other]],
    ]


def random_update(live: RefitWeights, name: str) -> Update:
    rows, columns = live._read(name).flatten(1).shape
    draw = torch.Generator().manual_seed(len(name))
    down = torch.randn(2, columns, generator=draw)
    return Update(down, torch.randn(rows, 2, generator=draw), 0.3)


def test_an_engine_that_keeps_its_weights_is_found_out(
    made: tuple[str, Made], make_tiny_base: Callable[..., Any], tmp_path: Path
) -> None:
    engine, live = open_live(made[1], made[0], tmp_path)
    engine.is_deaf = True
    with pytest.raises(EngineError, match="answers as before: its weights were not set anew"):
        live.use(updates_for(make_tiny_base, 1))
    engine.is_deaf = False
    live.use(updates_for(make_tiny_base, 1))
    engine.is_deaf = True
    with pytest.raises(EngineError, match="answers as before"):
        live.use(updates_for(make_tiny_base, 2))
    with pytest.raises(EngineError, match="answers as before"):
        live.use({})
    # What it did not take is set again, once it hears.
    engine.is_deaf = False
    live.use({})


def test_an_engine_that_is_set_to_something_else_is_found_out(
    made: tuple[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, live = open_live(made[1], made[0], tmp_path)
    name = next(iter(made[1][2].slots))
    live.use({name: random_update(live, name)})
    exact = Slot.fill
    monkeypatch.setattr(Slot, "fill", lambda slot, weight: exact(slot, 1.5 * weight))
    with pytest.raises(EngineError, match=r"refit: 'prediction' differs from eager by .*"):
        live.use({})


def test_what_changes_no_bit_need_not_change_the_answer(
    made: tuple[str, Made], tmp_path: Path
) -> None:
    _, live = open_live(made[1], made[0], tmp_path)
    name = next(iter(made[1][2].slots))
    live.use({name: random_update(live, name)._replace(scale=0.0)})


def test_an_adapter_must_answer_as_it_did_at_first(
    made: tuple[str, Made], make_tiny_base: Callable[..., Any], tmp_path: Path
) -> None:
    engine, live = open_live(made[1], made[0], tmp_path)
    updates = updates_for(make_tiny_base, 1)
    live.use(updates)
    live.use({})
    # The file of an adapter gives the same key.
    write_updates(tmp_path / "one.safetensors", updates)
    live.use(read_updates(tmp_path / "one.safetensors"))
    kept = tmp_path / f"denoiser-{digest(updates)}.npz"
    assert kept.exists()
    assert digest(updates) != digest(updates_for(make_tiny_base, 2))
    write_answer(tmp_path / "denoiser", digest(updates), answer_of(engine, made[1], factor=1.1))
    with pytest.raises(EngineError, match="refit: 'prediction' differs"):
        live.use(updates)
    kept.write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"denoiser-\w+\.npz is damaged"):
        live.use(updates)


def answer_of(engine: OnnxEngine, made: Made, *, factor: float) -> dict[str, np.ndarray]:
    given, _ = answer(made[1], made[0])
    return {name: factor * value for name, value in engine(given).items()}


def test_an_engine_that_was_built_wrong_is_found_out(
    made: tuple[str, Made], tmp_path: Path
) -> None:
    engine, live = open_live(made[1], made[0], tmp_path)
    write_answer(tmp_path / "denoiser", BASE, answer_of(engine, made[1], factor=1.1))
    with pytest.raises(EngineError, match="refit: 'prediction' differs"):
        live.fill()


def test_an_adapter_that_does_not_fit_sets_nothing(made: tuple[str, Made], tmp_path: Path) -> None:
    engine, live = open_live(made[1], made[0], tmp_path)
    name = next(iter(made[1][2].slots))
    good = random_update(live, name)
    wide = Update(torch.zeros(2, 3), good.up, 1.0)
    for updates, message in (
        (
            {name: good, "denoiser.x.weight": good},
            r"changes denoiser\.x\.weight, which this engine",
        ),
        ({name: wide}, rf"adapter's {name} is \[\d+, 3\], and this engine's is"),
    ):
        with pytest.raises(ModelError, match=message):
            live.use(updates)
    assert len(engine.pushed) == 1


def test_a_weight_that_is_not_beside_the_engine_is_told(
    made: tuple[str, Made], tmp_path: Path
) -> None:
    engine, live = open_live(made[1], made[0], tmp_path)
    name = next(iter(made[1][2].slots))
    engine.needs = {made[1][2].slots[name].name: "onnx::MatMul_7"}
    with pytest.raises(EngineError, match=r"asks for onnx::MatMul_7, .* Export it again"):
        live.use({name: random_update(live, name)})


def test_a_slot_says_how_a_weight_lies_there() -> None:
    weight = torch.randn(4, 3)
    there = Slot("a.T", "bfloat16", is_transposed=True).fill(weight)
    assert there.is_contiguous()
    assert torch.equal(there, weight.t().bfloat16())
    kernel = torch.randn(4, 3, 2, 2)
    assert torch.equal(Slot("a", "float32", is_transposed=False).fill(kernel), kernel)


def test_no_answer_is_kept_until_there_is_one(tmp_path: Path) -> None:
    assert read_answer(tmp_path / "denoiser", BASE) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cogvideox-1.5", "wan-2.2-A14B", "ltx-0.9.5"])
def test_denoisers_of_all_families_are_taken_and_take_adapters(
    name: str, tmp_path: Path, make_text_encoder: Callable[..., Any]
) -> None:
    size = FAMILIES[name][2]
    base = open_family(name, tmp_path / "a", make_text_encoder)
    made = make(base, tmp_path, "fp16", frames=9, size=size)
    program, _, declared = made
    model = read_model(declared.path)
    sites = find_sites(model)
    assert len(sites) == declared.attentions >= 2
    assert put_plugin(model, lambda _: True) == len(sites)
    # A part without inputs is computed when the graph is written.
    folded = set(product_weights(program)) - set(declared.slots)
    assert {name.split(".")[2] for name in folded} <= {"ofs_embedding"}
    engine, live = open_live(made, "fp16", tmp_path)
    given = program.signature.example(seed=8)
    before = engine(given)
    adapter = draw_adapter(open_family(name, tmp_path / "a", make_text_encoder), 1, size=0.1)
    live.use(updates_of(adapter))
    adapter.merge(base)
    module, signature = cut_role(base, "denoiser", frames=9, size=size)
    expected = run_eagerly(module, signature, device=torch.device("cpu"))(given)
    require(compare(expected, engine(given)), role="denoiser", tolerance="fp16")
    assert compare(before, expected)["prediction"].rel_l2 > 1e-3

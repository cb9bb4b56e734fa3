"""Graphs that are lifted, cut into regions and lowered to fewer bits.

References: the captured program itself; arithmetic in the same few bits, written out here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ltx, relative
from torch import Tensor, nn

from fewshot_rt.bases import open_base
from fewshot_rt.errors import ConfigError, EngineError
from fewshot_rt.export.forms import FORMS, derive, fp8_linear, int8_linear
from fewshot_rt.export.lifted import Lifted, Weight, lift
from fewshot_rt.export.lower import PRECISIONS, lower
from fewshot_rt.export.program import Program, capture
from fewshot_rt.export.regions import Plan, block_of, cut
from fewshot_rt.roles import make_roles, make_signatures
from fewshot_rt.spec import ROLES, Signature, TensorSpec

BATCH, LAYERS = 3, 4


@pytest.fixture(scope="module")
def programs(make_tiny_base: Callable[..., Any]) -> dict[str, Program]:
    base = make_tiny_base(layers=LAYERS)
    signatures = make_signatures(
        base, base.embed("mask"), latents=(8, 2, 8, 8), size=(32, 32), batch=BATCH
    )
    roles = make_roles(base, signatures)
    return {role: capture(roles[role], signatures[role], role=role) for role in ROLES}


def inputs(program: Program, batch: int) -> list[Tensor]:
    given = program.signature.example(seed=batch, batch=batch)
    return [torch.from_numpy(given[spec.name]) for spec in program.signature.inputs]


@torch.no_grad()
def play(regions: Any, plan: Plan, lifted: Lifted, given: list[Tensor]) -> list[Tensor]:
    """Call regions as a plan says, in plain PyTorch."""
    values: dict[int, Tensor] = {}

    def get(value: Any) -> Tensor:
        if value.kind == "weight":
            return derive(lifted.sources[value.name], value.form)
        return given[int(value.name)] if value.kind == "input" else values[int(value.name)]

    for call, spent in zip(plan.calls, plan.spent(), strict=True):
        results = regions[call.region](*(get(value) for value in call.takes))
        values |= zip(call.gives, results, strict=True)
        for number in spent:
            del values[number]
    return [get(value) for value in plan.outputs]


@torch.no_grad()
def reference(program: Program, given: list[Tensor]) -> Tensor:
    result: Tensor = program.exported.module()(*given)[0]
    return result


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("whole", [False, True])
def test_regions_give_what_the_program_gives(
    programs: dict[str, Program], role: str, whole: bool
) -> None:
    program = programs[role]
    lifted = lift(program)
    regions, plan = cut(lifted, whole=whole)
    plan = Plan.from_dict(plan.to_dict())
    for batch in range(1, BATCH + 1):
        given = inputs(program, batch)
        found = play(regions, plan, lifted, given)[0]
        torch.testing.assert_close(found, reference(program, given), rtol=0, atol=0)
    assert {weight.name for weight in plan.weights()} == set(lifted.sources)


def test_a_block_that_is_repeated_is_one_region(programs: dict[str, Program]) -> None:
    regions, plan = cut(lift(programs["denoiser"]))
    names = [call.region for call in plan.calls]
    assert len(regions) == 3
    assert names == [names[0], *[names[1]] * LAYERS, names[-1]]
    blocks = [call for call in plan.calls if call.region == names[1]]
    numbers = [{v.name.split("blocks.")[1][0] for v in c.takes if v.form} for c in blocks]
    assert numbers == [{str(i)} for i in range(LAYERS)]
    # What one block gives is let go when the next has taken it.
    assert [len(spent) for spent in plan.spent()[1:-2]] == [1] * (LAYERS - 1)


def test_nothing_is_cut_where_little_is_repeated(programs: dict[str, Program]) -> None:
    for role in ("encoder", "decoder"):
        regions, plan = cut(lift(programs[role]))
        assert len(regions) == len(plan.calls) == 1


def test_blocks_that_differ_are_not_shared(programs: dict[str, Program]) -> None:
    lifted = lift(programs["denoiser"])
    graph = lifted.module.graph
    gelu = [n for n in graph.nodes if n.target is torch.ops.aten.gelu.default]
    in_second = next(n for n in gelu if (place := block_of(n)) and place.number == 1)
    in_second.kwargs = {"approximate": "none"}
    given = inputs(programs["denoiser"], 2)
    regions, plan = cut(lifted)
    assert len(regions) == 4
    with torch.no_grad():
        weights = [
            derive(lifted.sources[lifted.weights[n.name].name], "plain")
            for n in graph.find_nodes(op="placeholder")
            if n.name in lifted.weights
        ]
        lifted.module.recompile()
        expected = lifted.module(*weights, *given)[0]
    torch.testing.assert_close(play(regions, plan, lifted, given)[0], expected, rtol=0, atol=0)


def test_lifting_leaves_the_program_as_it_was(programs: dict[str, Program]) -> None:
    program = programs["denoiser"]
    before = str(program.exported.graph)
    lifted = lift(program)
    lower(lifted, "int8")
    next(iter(lifted.sources.values())).zero_()
    assert str(program.exported.graph) == before
    given = inputs(program, 2)
    assert float(reference(program, given).abs().max()) > 0


class Counter(nn.Module):
    """Writes into its own buffer at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.count.add_(1)  # type: ignore[operator]
        return (tensors[0] + self.count,)  # type: ignore[operator]


def test_a_graph_that_writes_into_itself_is_refused() -> None:
    signature = Signature(
        inputs=(TensorSpec("x", "float32", (2, 3)),), outputs=(TensorSpec("y", "float32", (2, 3)),)
    )
    exported = torch.export.export(Counter(), (torch.ones(2, 3),), strict=False)
    with pytest.raises(EngineError, match="the counter writes into its own weights"):
        lift(Program("counter", exported, signature))


LIMITS = {"fp32": 0.0, "bf16": 1e-2, "fp16": 2e-3, "int8": 2e-2, "fp8": 5e-2}
LIMITS["bf16 around blocks"] = LIMITS["bf16"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fewer_bits_stay_close(programs: dict[str, Program], precision: str) -> None:
    program = programs["denoiser"]
    lifted = lift(program)
    lower(lifted, precision)
    regions, plan = cut(lifted)
    assert len(regions) == 3
    given = inputs(program, 3)
    error = relative(play(regions, plan, lifted, given)[0], reference(program, given))
    assert error <= LIMITS[precision]
    # None is the same arithmetic under another name.
    coarser = {"fp32": 0.0, "fp16": 1e-5, "int8": 5e-4, "fp8": 1e-3}
    assert error >= coarser.get(precision, 1e-4)


def test_8_bits_are_for_the_linear_layers_of_blocks(programs: dict[str, Program]) -> None:
    for precision in ("int8", "fp8"):
        lifted = lift(programs["denoiser"])
        lower(lifted, precision)
        small = {weight.name for weight in lifted.weights.values() if weight.form == precision}
        linear = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
        assert {name.split("blocks.")[1][2:] for name in small} == {
            f"{part}.weight"
            for name in linear
            for part in ([f"attn1.{name}", f"attn2.{name}"] if name.startswith("to") else [name])
        }
        plain = {weight.name for weight in lifted.weights.values() if weight.form == "plain"}
        assert not small & plain


def test_a_graph_in_bf16_stays_in_bf16(tmp_path: Path, make_text_encoder: Any) -> None:
    base: Any = open_base(str(ltx.write(tmp_path, "0.9.5", make_text_encoder())), weights="bf16")
    latents = base.geometry.latent_shape(frames=9, height=64, width=64)
    prompt = base.embed("mask")
    signatures = make_signatures(base, prompt, latents=latents, size=(64, 64), batch=BATCH)
    role, signature = make_roles(base, signatures)["denoiser"], signatures["denoiser"]
    program = capture(role, signature, role="denoiser")
    given = inputs(program, 2)
    for precision, limit in (("fp32", 0.0), ("bf16", 1e-2), ("fp8", 5e-2)):
        lifted = lift(program)
        assert "bf16" in {weight.form for weight in lifted.weights.values()}
        lower(lifted, precision)
        found = play(*cut(lifted), lifted, given)[0]
        assert relative(found.float(), reference(program, given).float()) <= limit


def test_an_unknown_precision_is_refused(programs: dict[str, Program]) -> None:
    with pytest.raises(ConfigError, match=r"unknown precision 'bf61'\. Did you mean 'bf16'"):
        lower(lift(programs["decoder"]), "bf61")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("form", "linear"), [("int8", int8_linear), ("fp8", fp8_linear)])
@pytest.mark.parametrize("bias", [None, 1])
def test_linear_layers_in_8_bits(form: str, linear: Any, bias: int | None) -> None:
    tokens, weight = draw(2, 5, 32, seed=1), draw(48, 32, seed=2)
    tokens[0, 1] = 0
    tokens[1] *= 1000
    added = None if bias is None else draw(48, seed=3)
    given = tokens, derive(weight, form), derive(weight, f"{form} scale"), added
    found = linear(*given)
    expected = nn.functional.linear(tokens, weight, added)
    assert found.shape == expected.shape
    assert found.dtype is torch.float32
    assert linear(tokens.bfloat16(), *given[1:]).dtype is torch.bfloat16
    # A token's own scale: the large ones do not drown the small.
    for row, other in zip(found.flatten(0, 1), expected.flatten(0, 1), strict=True):
        assert float((row - other).norm()) <= (0.02 if form == "int8" else 0.05) * max(
            float(other.norm()), 1e-6
        )


def test_forms_round_to_the_nearest_and_reach_the_ends() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.5, 0.0], [254.0, 1.0, -3.0, 127.0]])
    assert derive(weight, "int8").tolist() == [[127, -127, 64, 0], [127, 0, -2, 64]]
    torch.testing.assert_close(derive(weight, "int8 scale"), torch.tensor([1 / 127, 2.0]))
    back = derive(weight, "fp8").float() * derive(weight, "fp8 scale")[:, None]
    torch.testing.assert_close(back, weight, rtol=2**-4, atol=1e-3)
    assert derive(torch.tensor([1, 2]), "plain").dtype is torch.int64
    assert derive(weight.half(), "plain").dtype is torch.float32
    assert not any(derive(torch.zeros(2, 4), f).isnan().any() for f in FORMS)


def test_a_weight_is_known_by_name_and_form() -> None:
    assert Weight("a") == Weight("a", "plain")
    assert Weight("a") != Weight("a", "bf16")

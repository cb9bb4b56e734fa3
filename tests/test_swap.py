"""The pass that puts our operators into captured denoisers, on a tiny base of every family.

References: the eager role that was captured; what AOTInductor makes of the swapped graph.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import cogvideox, ltx, relative, wan
from torch import Tensor, nn

from fewshot_rt.bases import open_base
from fewshot_rt.export import compiled, regions
from fewshot_rt.export.engine import missing_compiler
from fewshot_rt.export.engines import aoti
from fewshot_rt.export.lifted import Lifted, lift
from fewshot_rt.export.live import LiveWeights
from fewshot_rt.export.lower import lower
from fewshot_rt.export.parity import TOLERANCES
from fewshot_rt.export.program import Program, capture
from fewshot_rt.kernels.swap import SDPA, Site, find_attention, swap_attention
from fewshot_rt.roles import make_roles, make_signatures
from fewshot_rt.transition import Transition

PLAIN = torch.ops.fewshot_rt.attention.default
NORMED = torch.ops.fewshot_rt.normed_attention.default
BATCHES, MOST = (1, 2), 3
EXACT = 1e-6


class Family(NamedTuple):
    """A family, how many attentions its tiny denoiser has, and in how far its frames lie apart.

    The norm and rotary pattern around all of them is understood.
    """

    name: str
    version: str
    attentions: int
    span: int | None = None


FAMILIES = (
    Family("pocket", "", 2),
    Family("wan", "2.1", 6),  # tokens, text and image in each of two blocks
    Family("wan", "2.2-5B", 4),
    Family("wan", "2.2-A14B", 8),  # two experts
    Family("wan", "2.2-5B", 4, 29),
    Family("ltx", "0.9.0", 4),
    Family("ltx", "0.9.5", 4),
    Family("cogvideox", "1.0", 2),
    Family("cogvideox", "1.5", 2),
    Family("cogvideox", "1.5", 2, 49),
)


class Role(NamedTuple):
    """A denoiser, and what it was captured to."""

    family: Family
    module: nn.Module
    program: Program

    def given(self, batch: int) -> list[Tensor]:
        """Draw tensors for it."""
        example = self.program.signature.example(seed=batch, batch=batch)
        return [torch.from_numpy(example[spec.name]) for spec in self.program.signature.inputs]

    @torch.no_grad()
    def expected(self, batch: int) -> Tensor:
        """Give what it predicts."""
        found: Tensor = self.module(*self.given(batch))[0]
        return found


def open_family(family: Family, folder: Path, text: Any, make_pocket: Any) -> Any:
    if family.name == "pocket":
        return make_pocket()
    if family.name == "wan":
        return open_base(str(wan.write(folder, family.version, text(is_multilingual=True))))
    writer: Any = {"ltx": ltx, "cogvideox": cogvideox}[family.name]
    return open_base(str(writer.write(folder, family.version, text())))


@torch.no_grad()
def randomise_norms(module: nn.Module) -> None:
    """Draw weights of norms anew: those of one would hide where they go."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def make_role(family: Family, base: Any) -> Role:
    randomise_norms(base.denoiser())
    frames = 9 if family.span == 49 else 5 if family.name == "pocket" else base.geometry.frames[0]
    if family.span is not None:
        kind = "discrete" if family.name == "cogvideox" else "repeat_target"
        base.play(Transition(kind=kind, frames=frames, span=family.span))
    multiple = base.geometry.multiple
    size = (32, 32) if family.name == "pocket" else (2 * multiple, 3 * multiple)
    latents = base.geometry.latent_shape(frames=frames, height=size[0], width=size[1])
    signatures = make_signatures(base, base.embed("mask"), latents=latents, size=size, batch=MOST)
    module = make_roles(base, signatures)["denoiser"]
    return Role(family, module, capture(module, signatures["denoiser"], role="denoiser"))


@pytest.fixture(scope="module")
def opened() -> dict[Family, Role]:
    return {}


@pytest.fixture
def get_role(
    opened: dict[Family, Role], tmp_path: Path, make_text_encoder: Any, make_tiny_base: Any
) -> Callable[[Family], Role]:
    """A function that gives the denoiser of a family, always the same."""

    def get(family: Family) -> Role:
        if family not in opened:
            base = open_family(family, tmp_path / "base", make_text_encoder, make_tiny_base)
            opened[family] = make_role(family, base)
        return opened[family]

    return get


@pytest.fixture(params=FAMILIES, ids=lambda f: "-".join(str(part) for part in f if part))
def role(request: pytest.FixtureRequest, get_role: Callable[[Family], Role]) -> Role:
    return get_role(request.param)


def require_swapped(module: Any, sites: tuple[Site, ...], family: Family, normed: bool) -> None:
    targets = [node.target for node in module.graph.nodes]
    expected = (0, family.attentions) if normed else (family.attentions, 0)
    assert (targets.count(PLAIN), targets.count(NORMED)) == expected
    assert SDPA not in targets
    assert [site.is_normed for site in sites] == [normed] * family.attentions
    module.graph.lint()


@torch.no_grad()
def play(lifted: Lifted, given: list[Tensor], *, whole: bool = False) -> tuple[Tensor, int]:
    """Cut a graph and run its regions in plain PyTorch; give their outcome and their number."""
    parts, plan = regions.cut(lifted, whole=whole)
    live = LiveWeights(lifted.sources.__getitem__, plan.weights())
    runner = compiled.PlanRunner(parts, plan, live, signature=None, device="cpu")  # type: ignore[arg-type]
    return runner.run(given)[0], len(parts)


@torch.no_grad()
@pytest.mark.parametrize("normed", [False, True])
def test_a_captured_graph_equals_its_role_with_our_operators(role: Role, normed: bool) -> None:
    module = copy.deepcopy(role.program.exported.graph_module)
    before = len(module.graph.nodes)
    listed = find_attention(module, normed=normed)
    assert len(module.graph.nodes) == before
    sites = swap_attention(module, normed=normed)
    assert sites == listed
    require_swapped(module, sites, role.family, normed)
    tensors = {**role.program.exported.state_dict, **role.program.exported.constants}
    specs = role.program.exported.graph_signature.input_specs
    weights = [tensors[spec.target] for spec in specs if spec.target is not None]
    for batch in BATCHES:
        found = module(*weights, *role.given(batch))[0]
        assert relative(found, role.expected(batch)) < EXACT
    # What norms and rotary embeddings took is gone, checks of types included.
    kinds = (torch.ops.aten.rms_norm.default, torch.ops.aten.neg.default)
    assert bool([n for n in module.graph.nodes if n.target in kinds]) is not normed


@torch.no_grad()
@pytest.mark.parametrize("normed", [False, True])
def test_an_exported_program_stays_one(
    get_role: Callable[[Family], Role], tmp_path: Path, normed: bool
) -> None:
    role = get_role(FAMILIES[0])
    exported = capture(role.module, role.program.signature, role="denoiser").exported
    swap_attention(exported.graph_module, normed=normed)
    with compiled.quiet():
        torch.export.save(exported, tmp_path / "program.pt2")
        module = torch.export.load(tmp_path / "program.pt2").module()
    for batch in BATCHES:
        assert relative(module(*role.given(batch))[0], role.expected(batch)) < EXACT


@pytest.mark.parametrize("normed", [False, True])
def test_a_lifted_graph_can_be_cut_and_brought_to_bf16(
    monkeypatch: pytest.MonkeyPatch, role: Role, normed: bool
) -> None:
    monkeypatch.setattr(regions, "MOST_COMPILED", 1.0)  # cut, however few blocks there are
    lifted = lift(role.program)
    number = len(regions.cut(lifted)[0])
    sites = swap_attention(lifted.module, normed=normed)
    require_swapped(lifted.module, sites, role.family, normed)
    for batch in BATCHES:
        found, count = play(lifted, role.given(batch))
        assert count == number
        assert relative(found, role.expected(batch)) < EXACT
    lower(lifted, "bf16")
    for batch in BATCHES:
        found, count = play(lifted, role.given(batch))
        assert count == number
        assert relative(found, role.expected(batch)) < TOLERANCES["bf16"]


class Meta(torch.fx.Interpreter):
    """Requires of each node that its tensor is as the graph says."""

    def run_node(self, n: torch.fx.Node) -> Any:
        found, said = super().run_node(n), n.meta.get("val")
        if isinstance(found, Tensor):
            shapes = zip(found.shape, said.shape, strict=True)
            assert all(isinstance(b, torch.SymInt) or a == b for a, b in shapes)
            assert found.dtype == said.dtype
        return found


@torch.no_grad()
@pytest.mark.parametrize("normed", [False, True])
def test_nodes_say_what_they_give_and_where_they_belong(
    get_role: Callable[[Family], Role], normed: bool
) -> None:
    for family in (FAMILIES[5], FAMILIES[8]):
        role = get_role(family)
        lifted = lift(role.program)
        old = {node.name: node for node in lifted.module.graph.nodes}
        sites = swap_attention(lifted.module, normed=normed)
        new = [node for node in lifted.module.graph.nodes if node.name not in old]
        ours = [node for node in new if node.target in (PLAIN, NORMED)]
        for node, site in zip(ours, sites, strict=True):
            stack = old[site.node].meta["nn_module_stack"]
            assert node.meta["nn_module_stack"] == stack
        places = [node.meta["nn_module_stack"] for node in ours]
        assert all(node.meta["nn_module_stack"] in places for node in new)
        weights = [lifted.sources[weight.name] for weight in lifted.weights.values()]
        found = Meta(lifted.module).run(*weights, *role.given(2))[0]
        assert relative(found, role.expected(2)) < EXACT


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[8]], ids=lambda f: f.name)
def test_aot_inductor_compiles_what_was_swapped(
    monkeypatch: pytest.MonkeyPatch, get_role: Callable[[Family], Role], family: Family
) -> None:
    # Block by block: compiling more than one would show nothing new.
    monkeypatch.setattr(regions, "_choose", lambda nodes: list(regions._segments(nodes)))
    role = get_role(family)
    lifted = lift(role.program)
    swap_attention(lifted.module)
    parts: dict[str, Any]
    parts, plan = regions.cut(lifted)
    name = next(
        n for n, p in parts.items() if p.graph.find_nodes(op="call_function", target=NORMED)
    )
    with compiled.quiet():
        content = aoti.compile_region(compiled.trace(parts[name], most=MOST))
    parts[name] = aoti.open_region(content, Path(name))
    live = LiveWeights(lifted.sources.__getitem__, plan.weights())
    runner = compiled.PlanRunner(parts, plan, live, role.program.signature, device="cpu")
    for batch in BATCHES:
        found = runner.run(role.given(batch))[0]
        assert relative(found, role.expected(batch)) < TOLERANCES["fp32"]

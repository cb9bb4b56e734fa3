"""References: the eager role that was captured, at every batch that the signature admits."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewshot_rt.autoencoder_layers import TimeGrow
from fewshot_rt.export.bound import lowered
from fewshot_rt.export.folding import fold_weights
from fewshot_rt.export.program import capture
from fewshot_rt.export.rotary import interleave_halves, part_halves
from fewshot_rt.roles import make_roles, make_signatures
from fewshot_rt.spec import ROLES, Signature, TensorSpec

BATCH = 4


@pytest.fixture
def cut(tiny_base: Any) -> tuple[dict[str, Any], dict[str, Signature]]:
    prompt = tiny_base.embed("mask")
    signatures = make_signatures(
        tiny_base, prompt, latents=(8, 2, 8, 8), size=(32, 32), batch=BATCH
    )
    return make_roles(tiny_base, signatures), signatures


def arrays(signature: Signature, **sizes: int) -> list[Tensor]:
    example = signature.example(seed=3, **sizes)
    return [torch.from_numpy(example[spec.name]) for spec in signature.inputs]


@pytest.mark.parametrize("role", ROLES)
def test_a_program_equals_its_role_at_every_batch(
    cut: tuple[dict[str, Any], dict[str, Signature]], role: str
) -> None:
    roles, signatures = cut
    module = capture(roles[role], signatures[role], role=role).exported.module()
    for batch in range(1, BATCH + 1):
        given = arrays(signatures[role], batch=batch)
        with torch.no_grad():
            for program_result, result in zip(module(*given), roles[role](*given), strict=True):
                torch.testing.assert_close(program_result, result, rtol=0, atol=0)


def test_a_program_keeps_only_the_weights_that_it_reads(
    cut: tuple[dict[str, Any], dict[str, Signature]], tiny_base: Any
) -> None:
    roles, signatures = cut
    for role, other in (("encoder", ".decoder."), ("decoder", ".encoder.")):
        program = capture(roles[role], signatures[role], role=role)
        # The weights that the role reads are those that get a gradient from its result.
        tiny_base.autoencoder.zero_grad()
        tiny_base.autoencoder.requires_grad_(True)
        roles[role](*arrays(signatures[role]))[0].sum().backward()
        tiny_base.autoencoder.requires_grad_(False)
        read = {name for name, p in roles[role].named_parameters() if p.grad is not None}
        # What is made of a weight has its name in front.
        kept = {re.sub(r"(weight|bias)_.*", r"\1", name) for name in program.exported.state_dict}
        # Two layers that became one have the name of the second.
        grown = [n for n, m in roles[role].named_modules() if isinstance(m, TimeGrow)]
        assert kept == read - {f"{name}.conv.weight" for name in grown}
        assert not any(other in name for name in read)
        assert 0 < program.size_bytes < 4 * sum(p.numel() for p in roles[role].parameters())


class Double(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (2 * tensors[0],)


def doubling(most: int) -> Signature:
    return Signature(
        inputs=(TensorSpec("x", "float32", ("batch", 3)),),
        outputs=(TensorSpec("y", "float32", ("batch", 3)),),
        sizes={"batch": (1, 1, most)},
    )


def test_an_axis_that_is_usually_one_still_varies() -> None:
    module = capture(Double(), doubling(5), role="double").exported.module()
    for batch in (1, 5):
        x = torch.full((batch, 3), 1.5)
        assert torch.equal(module(x)[0], 2 * x)


def test_an_axis_that_is_always_one_is_fixed() -> None:
    program = capture(Double(), doubling(1), role="double")
    assert torch.equal(program.exported.module()(torch.ones(1, 3))[0], torch.full((1, 3), 2.0))


def test_no_path_of_this_machine_gets_into_a_program(
    cut: tuple[dict[str, Any], dict[str, Signature]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it is anywhere but in these tests (conftest.py); then torch notes where a node is from.
    monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", False)
    roles, signatures = cut
    program = capture(roles["decoder"], signatures["decoder"], role="decoder")
    assert all("stack_trace" not in node.meta for node in program.exported.graph.nodes)


def test_nan_goes_through(cut: tuple[dict[str, Any], dict[str, Signature]]) -> None:
    roles, signatures = cut
    module = capture(roles["encoder"], signatures["encoder"], role="encoder").exported.module()
    given = arrays(signatures["encoder"], batch=2)
    given[0][1] = np.nan
    result = module(*given)[0]
    assert torch.isfinite(result[0]).all()
    assert torch.isnan(result[1]).any()


class Halves(nn.Module):
    """Writes the halves of a tensor in turns, or, if it is `odd`, something else of that look."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, dtype=torch.float64 if self.odd == "converts" else None)
        early = out.view(-1) if self.odd == "read early" else None
        if self.odd == "other axis":
            out[0::2], out[1::2] = x[1::2], x[0::2]
        elif self.odd == "three":
            out[..., 0::3], out[..., 1::3], out[..., 2::3] = (x[..., i::3] for i in (1, 2, 0))
        else:
            out[..., 0::2].copy_(x[..., :1] if self.odd == "repeats" else x[..., 0::2] * 3)
            out[..., 1::2] = x[..., 1::2] + 1
        return (out if early is None else early).type_as(x) * 2


@pytest.mark.parametrize(
    ("odd", "count"),
    [("", 1)] + [(odd, 0) for odd in ("converts", "repeats", "other axis", "three", "read early")],
)
def test_halves_are_interleaved_where_that_is_the_same(odd: str, count: int) -> None:
    module = Halves(odd)
    x = torch.arange(48, dtype=torch.float32).reshape(2, 4, 6)
    exported = torch.export.export(module, (x,), strict=False)
    assert interleave_halves(exported) == count
    assert torch.equal(exported.module()(x), module(x))


def test_rotary_embeddings_of_the_denoiser_are_interleaved(
    cut: tuple[dict[str, Any], dict[str, Signature]],
) -> None:
    roles, signatures = cut
    program = capture(roles["denoiser"], signatures["denoiser"], role="denoiser")
    names = [str(node.target) for node in program.exported.graph.nodes]
    # One layer rotates queries and keys.
    assert names.count("aten.stack.default") == 2
    assert "aten.empty_like.default" not in names
    assert "aten.copy_.default" not in names


def test_queries_and_keys_are_parted_alike(
    cut: tuple[dict[str, Any], dict[str, Signature]],
) -> None:
    roles, signatures = cut
    program = capture(roles["denoiser"], signatures["denoiser"], role="denoiser")
    counts: list[int] = []
    parted = lowered(program, "fp32", change=lambda graph: counts.append(part_halves(graph)))
    assert counts == [1]
    names = [str(node.target) for node in parted.exported.graph.nodes]
    assert "aten.stack.default" not in names
    assert "aten.unbind.int" not in names
    # The graph that was captured stays as it was.
    assert "aten.stack.default" in [str(node.target) for node in program.exported.graph.nodes]
    for batch in (1, BATCH):
        given = arrays(signatures["denoiser"], batch=batch)
        found, expected = (p.exported.module()(*given)[0] for p in (parted, program))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """Attends to itself with rotated queries and keys, or, if it is `odd`, otherwise."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        turned = self.turn(x, angle)
        query, key = turned.transpose(1, 2), self.turn(x * 2, angle).transpose(1, 2)
        if self.odd == "keys as they are":
            key = x.transpose(1, 2)
        if self.odd == "values":
            query, key = x.transpose(1, 2), x.transpose(1, 2)
        value = (turned if self.odd == "values" else x).transpose(1, 2)
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        return found + query if self.odd == "read elsewhere" else found

    def turn(self, x: Tensor, angle: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(turned, -1).flatten(-2)


@pytest.mark.parametrize(
    ("odd", "count"),
    [("", 1)] + [(odd, 0) for odd in ("keys as they are", "values", "read elsewhere")],
)
def test_channels_are_parted_where_queries_and_keys_alone_see_it(odd: str, count: int) -> None:
    module, generator = Attention(odd), torch.Generator().manual_seed(0)
    given = tuple(torch.randn(s, generator=generator) for s in ((2, 5, 3, 8), (1, 5, 1, 4)))
    exported = torch.export.export(module, given, strict=False)
    assert part_halves(exported.graph) == count
    exported.graph_module.recompile()
    torch.testing.assert_close(exported.module()(*given), module(*given), rtol=1e-5, atol=1e-6)


class Folded(nn.Module):
    """Convolves with what it makes of weights, or, if it is `odd`, of something else, too."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        self.weight = nn.Parameter(torch.arange(48, dtype=torch.float32).reshape(4, 3, 2, 2) / 48)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        first, second = self.weight.chunk(2)
        weight = first + second.flip(0)
        if self.odd == "of the input":
            weight = weight * tensors[0].mean()
        if self.odd == "written":
            before = self.seen + 1
            self.seen.add_(1)
            weight = weight + before.sum()
        return (nn.functional.conv2d(tensors[0], weight) + self.weight.sum(),)


@pytest.mark.parametrize(
    ("odd", "names"),
    [
        ("", {"weight_chunk_getitem_add", "weight_sum_1"}),
        ("of the input", {"weight_chunk_getitem_add", "weight_sum_1"}),
        ("written", {"weight_chunk_getitem_add", "weight_sum_2"}),
    ],
)
def test_what_is_made_of_weights_alone_is_a_weight(odd: str, names: set[str]) -> None:
    module, x = Folded(odd), torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(module, (x,), strict=False)
    assert fold_weights(exported) == len(names)
    assert set(exported.state_dict) == {"weight", "seen"} | names
    folded, module = exported.module(), copy.deepcopy(module)
    for _ in range(2):  # a buffer that is written counts the calls
        torch.testing.assert_close(folded(x)[0], module(x)[0], rtol=1e-6, atol=1e-6)

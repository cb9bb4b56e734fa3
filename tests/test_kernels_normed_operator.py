"""`fewshot_rt::normed_attention` as an operator: its results, checks, fakes, export, refusals.

Reference: diffusers' attention processors, and torch's own checks of operators.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewshot_rt.kernels import launches
from fewshot_rt.kernels.declaration import HAS_TRITON
from fewshot_rt.kernels.normed import normed_attention

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ACROSS, PER_HEAD = "rms_norm_across_heads", "layer_norm"
HEADS, WIDTH, TEXT, GRID = 3, 16, 4, (3, 2, 5)
LENGTH, CHANNELS = 30, 48
NAMES = (
    *("query", "key", "value", "query_weight", "query_bias", "key_weight", "key_bias"),
    *("cosine", "sine", "mask", "heads"),
)


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def turning(length: int, pairs: int = WIDTH // 2) -> tuple[Tensor, Tensor]:
    angles = torch.randn(length, pairs)
    return angles.cos(), angles.sin()


def wan(queries: int = 5, dtype: Any = torch.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of attention among tokens, as in Wan."""
    tokens = [torch.randn(2, queries, CHANNELS).to(dtype) for _ in range(3)]
    weights = [torch.randn(CHANNELS).to(dtype) for _ in range(2)]
    norms = (weights[0], None, weights[1], None)
    options = {"kind": ACROSS, "epsilon": 1e-6}
    return (*tokens, *norms, *turning(queries), None, HEADS), options


def ltx_text(dtype: Any = torch.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of attention to padded text, as in LTX."""
    arguments, options = wan(dtype=dtype)
    text = [torch.randn(2, 7, CHANNELS).to(dtype) for _ in range(2)]
    mask = torch.arange(7)[None] < torch.tensor([[7], [3]])
    return (arguments[0], *text, *arguments[3:7], None, None, mask, HEADS), options


def cogvideox(dtype: Any = torch.float32) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of attention among text and tokens, as in CogVideoX."""
    arguments, _ = wan(dtype=dtype)
    norms = [torch.randn(WIDTH).to(dtype) for _ in range(4)]
    options = {"kind": PER_HEAD, "epsilon": 1e-6, "skip": 2}
    return (*arguments[:3], *norms, *turning(3), None, HEADS), options


FAMILIES = [wan, ltx_text, cogvideox]


def randomise(module: nn.Module, dtype: Any) -> Any:
    """Draw all weights anew: a norm's weights of one would hide where they go."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module.to(dtype).eval()


def attend(attn: Any, tokens: Tensor, context: Tensor, *tables: Any, mask: Any = None) -> Tensor:
    """Do with our operator what the layer of Wan or LTX does."""
    norms = (attn.norm_q.weight, None, attn.norm_k.weight, None)
    projections = (attn.to_q(tokens), attn.to_k(context), attn.to_v(context))
    options = {"kind": ACROSS, "epsilon": attn.norm_q.eps}
    tables = tables or (None, None)
    answer: Tensor = attn.to_out[0](
        normed_attention(*projections, *norms, *tables, mask, HEADS, **options)
    )
    return answer


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 40, 64])
def test_the_cpu_gives_what_wan_gives_to_the_last_bit(width: int, dtype: Any) -> None:
    from diffusers.models.transformers.transformer_wan import (
        WanAttention,
        WanAttnProcessor,
        WanRotaryPosEmbed,
    )

    sizes: dict[str, Any] = {"heads": HEADS, "dim_head": width, "processor": WanAttnProcessor()}
    attn = randomise(WanAttention(HEADS * width, **sizes), dtype)
    tokens, text = (torch.randn(2, n, HEADS * width).to(dtype) for n in (LENGTH, TEXT))
    tables = WanRotaryPosEmbed(width, (1, 1, 1), 8)(torch.empty(1, 1, *GRID))
    halves = (tables[0][0, :, 0, 0::2], tables[1][0, :, 0, 1::2])
    assert torch.equal(attend(attn, tokens, tokens, *halves), attn(tokens, None, None, tables))
    attn = randomise(WanAttention(HEADS * width, cross_attention_dim_head=width, **sizes), dtype)
    assert torch.equal(attend(attn, tokens, text), attn(tokens, text, None, None))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 40, 64])
def test_the_cpu_gives_what_ltx_gives_to_the_last_bit(width: int, dtype: Any) -> None:
    from diffusers.models.transformers.transformer_ltx import LTXAttention, LTXVideoRotaryPosEmbed

    channels = HEADS * width
    sizes: dict[str, Any] = {"heads": HEADS, "kv_heads": HEADS, "dim_head": width, "bias": True}
    attn = randomise(LTXAttention(channels, **sizes), dtype)
    tokens, text = (torch.randn(2, n, channels).to(dtype) for n in (LENGTH, TEXT))
    tables = LTXVideoRotaryPosEmbed(channels)(tokens, *GRID, (0.8, 32.0, 32.0))
    halves = (table[..., 0::2] for table in tables)
    assert torch.equal(attend(attn, tokens, tokens, *halves), attn(tokens, None, None, tables))
    mask = torch.arange(TEXT)[None] < torch.tensor([[TEXT], [1]])
    penalty = ((1 - mask.to(dtype)) * -10000.0)[:, None]
    expected = attn(tokens, text, penalty)
    assert torch.equal(attend(attn, tokens, text, mask=mask), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_gives_what_cogvideox_gives_to_the_last_bit(dtype: Any) -> None:
    from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    width, processor = 64, CogVideoXAttnProcessor2_0()
    sizes = {"heads": HEADS, "dim_head": width, "qk_norm": "layer_norm", "eps": 1e-6}
    attn = randomise(Attention(HEADS * width, **sizes, bias=True, processor=processor), dtype)
    video, text = (torch.randn(2, n, HEADS * width).to(dtype) for n in (LENGTH, TEXT))
    tables = get_3d_rotary_pos_embed(width, ((0, 0), GRID[1:]), GRID[1:], GRID[0])
    tokens = torch.cat((text, video), dim=1)
    found = normed_attention(
        *(attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)),
        *(attn.norm_q.weight, attn.norm_q.bias, attn.norm_k.weight, attn.norm_k.bias),
        *(table[:, 0::2] for table in tables),
        *(None, HEADS),
        kind=PER_HEAD,
        epsilon=attn.norm_q.eps,
        skip=TEXT,
    )
    expected = attn(video, text, image_rotary_emb=tables)
    assert torch.equal(attn.to_out[0](found), torch.cat((expected[1], expected[0]), dim=1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_may_stay_in_fp32(family: Any, dtype: Any) -> None:
    arguments, options = family(dtype=dtype)
    widened = (*arguments[:3], *(t if t is None else t.float() for t in arguments[3:7]))
    found = normed_attention(*widened, *arguments[7:], **options)
    # Not a bit differs but in layer norm, which torch computes in another order then.
    expected = normed_attention(*arguments, **options)
    assert found.dtype == dtype
    assert (found - expected).norm() <= torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_finds_nothing_wrong_with_the_operator(family: Any, dtype: Any) -> None:
    torch.library.opcheck(normed_attention, *family(dtype=dtype))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fakes_have_the_shape_and_strides_of_answers(family: Any, device: str) -> None:
    from torch._subclasses import FakeTensorMode

    arguments, options = family()
    real = normed_attention(*arguments, **options)
    assert real.is_contiguous()
    with FakeTensorMode():
        fakes = [
            torch.empty(t.shape, dtype=t.dtype, device=device) if isinstance(t, Tensor) else t
            for t in arguments
        ]
        fake = normed_attention(*fakes, **options)
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())
    assert (fake.dtype, fake.device.type) == (real.dtype, device)


class Layer(nn.Module):
    """A layer with weights, as the swap will meet it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.weight = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        projections = self.project(tokens).chunk(3, dim=-1)
        norms, options = (self.weight, None) * 2, {"kind": ACROSS, "epsilon": 1e-6}
        answer: Tensor = normed_attention(
            *projections, *norms, cosine, sine, None, HEADS, **options
        )
        return answer


@torch.no_grad()
def test_an_exported_module_keeps_the_operator_at_all_lengths() -> None:
    module, length = Layer(), torch.export.Dim("length")
    inputs = (torch.randn(2, 5, CHANNELS), *turning(5))
    exported = torch.export.export(
        module, inputs, dynamic_shapes=({1: length}, {0: length}, {0: length})
    )
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.fewshot_rt.normed_attention.default) == 1
    for size in (2, 5, 33):
        inputs = (torch.randn(2, size, CHANNELS), *turning(size))
        assert torch.equal(exported.module()(*inputs), module(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_compilers_on_the_cpu_see_torch_alone(family: Any) -> None:
    from torch._dynamo.backends.common import aot_autograd

    seen: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    arguments, options = family()
    compiled = torch.compile(
        lambda *given: normed_attention(*given, **options), backend=aot_autograd(fw_compiler=keep)
    )
    found = compiled(*arguments)
    assert seen
    assert {t.namespace for t in seen if hasattr(t, "namespace")} <= {"aten", "prims"}
    torch.testing.assert_close(found, normed_attention(*arguments, **options))


@pytest.mark.parametrize("place", range(9))
def test_a_gradient_is_refused_at_the_call(place: int) -> None:
    arguments, options = cogvideox()
    arguments[place].requires_grad_()
    with pytest.raises(RuntimeError, match=r"normed_attention has no gradient.*torch\.no_grad"):
        normed_attention(*arguments, **options)
    with torch.no_grad():
        assert not normed_attention(*arguments, **options).requires_grad


TOKENS, TABLE = torch.zeros(2, 5, CHANNELS), torch.zeros(5, WIDTH // 2)
PROJECTIONS = ("query", "key", "value")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 5, WIDTH)}, "takes .B, L, C."),
        ({"query": TOKENS.double()}, "bf16, fp16 or fp32"),
        ({"query": TOKENS.half()}, "one type"),
        ({"value": torch.zeros(2, 6, CHANNELS)}, "share batch"),
        ({"key": TOKENS[:1], "value": TOKENS[:1]}, "share batch"),
        ({"heads": 5}, "5 heads of equal width"),
        ({"heads": 0}, "0 heads of equal width"),
        (dict.fromkeys(PROJECTIONS, torch.zeros(2, 5, 3 * 144)), "128 wide"),
        (dict.fromkeys(PROJECTIONS, torch.zeros(2, 5, 8320)) | {"heads": 65}, "8192 together"),
        ({"kind": "rms_norm"}, "Possible: rms_norm_across_heads, layer_norm"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"query_weight": torch.zeros(WIDTH)}, r"takes weights .48.*query_weight .16."),
        ({"key_weight": torch.zeros(CHANNELS).half()}, "in fp32 or the type of the query"),
        ({"key_bias": torch.zeros(CHANNELS)}, r"takes no biases.*key_bias .48."),
        ({"kind": PER_HEAD}, "takes two biases"),
        ({"sine": None}, "takes cosine and sine"),
        ({"cosine": None, "sine": None, "skip": 1}, "takes cosine and sine"),
        ({"skip": 1}, r"tables must be .4, 8. or .2, 4, 24."),
        ({"skip": 6}, "no longer a skip"),
        ({"skip": -1}, "no longer a skip"),
        (dict.fromkeys(("key", "value"), torch.zeros(2, 6, CHANNELS)), "as many keys as queries"),
        ({"heads": 16}, "heads of even width"),
        ({"sine": TABLE[:, :4]}, "tables must be .5, 8. or .2, 5, 24."),
        ({"sine": torch.zeros(2, 5, 24)}, "tables must be"),
        (dict.fromkeys(("cosine", "sine"), torch.zeros(1, 5, 24)), "tables must be"),
        (dict.fromkeys(("cosine", "sine"), TABLE.double()), "tables must be"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, "must be bool"),
        ({"scale": -1.0}, "positive"),
        ({"precision": "tf16"}, "Possible: ieee, tf32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments, options = wan()
    given = dict(zip(NAMES, arguments, strict=True)) | options | change
    with pytest.raises(ValueError, match=message):
        normed_attention(**given)


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels need triton")
def test_caches_of_compiled_graphs_know_both_kernels() -> None:
    from torch._library.triton import get_triton_kernels_for_op

    from fewshot_rt.kernels.attention import attention_kernel
    from fewshot_rt.kernels.normed import prepare_kernel

    found = get_triton_kernels_for_op("fewshot_rt::normed_attention")
    assert len(found) == 2
    assert attention_kernel in found
    assert prepare_kernel in found


@pytest.mark.skipif(not HAS_TRITON, reason="tracing the kernels needs triton")
def test_on_cuda_a_graph_holds_three_launches_that_write_to_nothing_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._functorch.aot_autograd import aot_export_module
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    # torch reads from the kernel's code what it writes to, and asks for which GPU.
    gpu = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    shapes = [(2, 301, 1536)] * 3 + [(1536,)] * 2 + [(301, 64)] * 2
    with FakeTensorMode(), torch.no_grad():
        fakes = [torch.empty(shape, device="cuda").bfloat16() for shape in shapes]
        graph, _ = aot_export_module(WanLayer(), fakes, trace_joint=False)
    nodes = [node for node in graph.graph.nodes if "triton_kernel" in str(node.target)]
    assert [node.kwargs["tensors_to_clone"] for node in nodes] == [["out"]] * 3
    rows = launches.row_launch_for("sm_90", 1536)
    blocks = launches.launch_for("sm_90", dtype=torch.bfloat16, width=128, precision="ieee")
    row_programs, programs = 2 * -(-301 // rows.rows), 2 * 12 * -(-301 // blocks.query_block)
    grids = [node.kwargs["grid"] for node in nodes]
    assert grids == [[(row_programs, 1, 1)]] * 2 + [[(programs, 1, 1)]]
    kernels = [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]) for node in nodes]
    assert [k.configs[0].num_warps for k in kernels] == [rows.warps, rows.warps, blocks.warps]


class WanLayer(nn.Module):
    """Attention of Wan 1.3B from its projections."""

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        *tokens, query_weight, key_weight, cosine, sine = given
        norms, options = (query_weight, None, key_weight, None), {"kind": ACROSS, "epsilon": 1e-6}
        return (normed_attention(*tokens, *norms, cosine, sine, None, 12, **options),)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch
from fewshot_rt.kernels.normed import HAS_TRITON, Preparation, _prepare_on_cuda, normed_attention
tokens, weight = torch.ones(1, 2, 32), torch.ones(32)
options = {"kind": "rms_norm_across_heads", "epsilon": 1e-6}
norms = (weight, None, weight, None)
found = normed_attention(tokens, tokens, tokens, *norms, None, None, None, 2, **options)
assert not HAS_TRITON and found.eq(1).all()
try:
    _prepare_on_cuda(tokens, weight, None, Preparation(heads=2, **options))
except RuntimeError as error:
    print(error)
"""


def test_without_triton_the_cpu_still_works_and_cuda_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TRITON]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "needs the package 'triton'" in result.stdout
    assert "fewshot-rt[cuda]" in result.stdout

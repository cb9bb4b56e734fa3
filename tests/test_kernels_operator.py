"""`fewshot_rt::attention` as an operator: checks, fakes, export, refusals.

Reference: the attention of `kernels/reference.py`, and torch's own checks of operators.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewshot_rt.export.parity import KERNEL_RATIO
from fewshot_rt.kernels import launches, reference
from fewshot_rt.kernels.attention import HAS_TRITON, attention

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(queries: int, keys: int, *, width: int = 16, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, length, width) for length in (queries, keys, keys))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def padded(keys: int) -> Tensor:
    return torch.arange(keys)[None] < torch.tensor([[keys], [max(1, keys // 2)]])


class Layer(nn.Module):
    """A layer with weights, as the swap will meet it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        answer: Tensor = attention(self.project(query), key, value, mask)
        return answer.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 7), (64, 33)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_the_cpu_gives_attention(queries: int, keys: int, is_masked: bool, dtype: Any) -> None:
    tensors, mask = draw(queries, keys, dtype=dtype), padded(keys) if is_masked else None
    found = attention(*tensors, mask)
    expected = reference.attention(*(t.double() for t in tensors), mask=mask)
    # The answer and the weights are rounded once each.
    limit = KERNEL_RATIO * torch.finfo(dtype).eps * expected.norm()
    assert (found - expected).norm() <= limit
    assert found.dtype is dtype
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_masked", [False, True])
def test_torch_finds_nothing_wrong_with_the_operator(is_masked: bool, dtype: Any) -> None:
    query, key, value = draw(5, 7, dtype=dtype)
    mask = padded(7) if is_masked else None
    torch.library.opcheck(attention, (query, key, value, mask, 0.3))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fakes_have_the_shape_and_strides_of_answers(device: str) -> None:
    from torch._subclasses import FakeTensorMode

    real = attention(*draw(5, 7))
    with FakeTensorMode():
        fakes = [torch.empty(2, 3, length, 16, device=device) for length in (5, 7, 7)]
        fake = attention(*fakes)
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())
    assert (fake.dtype, fake.device.type) == (real.dtype, device)


@torch.no_grad()
def test_an_exported_module_keeps_the_operator_at_all_lengths() -> None:
    module, tensors = Layer(), draw(5, 7)
    queries, keys = torch.export.Dim("queries"), torch.export.Dim("keys")
    exported = torch.export.export(
        module,
        (*tensors, padded(7)),
        dynamic_shapes=({2: queries}, {2: keys}, {2: keys}, {1: keys}),
    )
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.fewshot_rt.attention.default) == 1
    for lengths in ((5, 7), (1, 3), (33, 1)):
        inputs = (*draw(*lengths), padded(lengths[1]))
        assert torch.equal(exported.module()(*inputs), module(*inputs))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_gradient_is_refused_at_the_call(place: int) -> None:
    tensors = draw(5, 7)
    tensors[place].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient.*torch\.no_grad"):
        attention(*tensors)
    with torch.no_grad():
        assert not attention(*tensors).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 16)}, "takes .B, N, L, D."),
        ({"query": torch.zeros(2, 3, 5, 16).double()}, "bf16, fp16 or fp32"),
        ({"query": torch.zeros(2, 3, 5, 16).half()}, "one type"),
        ({"query": torch.zeros(2, 4, 5, 16)}, "share batch"),
        ({"value": torch.zeros(2, 3, 6, 16)}, "share batch"),
        ({n: torch.zeros(2, 3, 5, 144) for n in ("query", "key", "value")}, "128 wide"),
        ({"scale": -1.0}, "positive"),
        ({"precision": "tf16"}, "Possible: ieee, tf32"),
        ({n: torch.zeros(2, 3, 5, 16).half() for n in ("query", "key", "value")}, "is for fp32"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, "must be bool"),
        ({"mask": torch.ones(2, 7)}, "must be bool"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = dict(zip(("query", "key", "value"), draw(5, 7), strict=True))
    if message == "is for fp32":
        arguments["precision"] = "tf32"
    with pytest.raises(ValueError, match=message):
        attention(**(arguments | change))


def test_every_architecture_has_a_launch_for_every_width() -> None:
    for name, architecture in launches.ARCHITECTURES.items():
        assert set(architecture.launches) == {"half", *launches.PRECISIONS}
        for width in (1, 32, 40, 64, 80, 96, 128):
            for dtype in DTYPES:
                launch = launches.launch_for(name, dtype=dtype, width=width, precision="tf32")
                assert width <= launch.width_block <= max(32, 2 * width)


def test_an_unknown_gpu_is_refused() -> None:
    assert launches.architecture((8, 6)) == launches.architecture((12, 0)) == "sm_89"
    with pytest.raises(ValueError, match=r"capability 7\.5\. Possible: 8\.0"):
        launches.architecture((7, 5))


@pytest.mark.skipif(not HAS_TRITON, reason="the kernel needs triton")
def test_caches_of_compiled_graphs_know_the_kernel() -> None:
    from torch._library.triton import get_triton_kernels_for_op

    from fewshot_rt.kernels.attention import attention_kernel

    assert get_triton_kernels_for_op("fewshot_rt::attention") == [attention_kernel]


@pytest.mark.skipif(not HAS_TRITON, reason="tracing the kernel needs triton")
def test_on_cuda_a_graph_holds_the_kernel_with_its_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from fewshot_rt.kernels.attention import _on_cuda

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        tensors = [torch.empty(2, 3, n, 64, device="cuda").bfloat16() for n in (300, 7, 7)]
        traced = make_fx(lambda *t: _on_cuda(*t, None, 0.125, "ieee"))(*tensors)
    (node,) = (n for n in traced.graph.nodes if "triton_kernel" in str(n.target))
    launch = launches.launch_for("sm_90", dtype=torch.bfloat16, width=64, precision="ieee")
    # Five blocks of 64 queries for each head.
    assert (launch.query_block, node.kwargs["grid"]) == (64, [(5 * 2 * 3, 1, 1)])
    assert node.kwargs["kwargs"]["QUERY_BLOCK"] == launch.query_block
    (config,) = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).configs
    assert (config.num_warps, config.num_stages) == (launch.warps, launch.stages)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import torch
from fewshot_rt.kernels.attention import HAS_TRITON, _on_cuda, attention
tensors = [torch.ones(1, 1, 2, 16)] * 3
assert not HAS_TRITON and attention(*tensors).eq(1).all()
try:
    _on_cuda(*tensors, None, 1.0, "ieee")
except RuntimeError as error:
    print(error)
"""


def test_without_triton_the_cpu_still_works_and_cuda_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TRITON]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "needs the package 'triton'" in result.stdout
    assert "fewshot-rt[cuda]" in result.stdout

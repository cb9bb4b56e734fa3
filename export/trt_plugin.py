"""Our attention kernel as a TensorRT plugin: PTX that the engine keeps, launched without Python.

Such plugins (`tensorrt.plugin`, ahead of time) have PTX alone, one kernel, one launch and no
workspace; their tensors are dense, and attributes of theirs are not kept. So there is a plugin for
each layout in memory, and everything else is in the shapes, which must not vary: engines leak
modules where they do (NVIDIA/TensorRT #4849). Nothing here is needed to open an engine.
Axes: B batch, N heads, L tokens of the queries, K tokens of the keys, D head width.
Source: `tensorrt.plugin` 10.14 and 11.4, `register` and `aot_impl`.
"""

from functools import cache

NAMESPACE = "fewshot_rt"
# By name, whether tensors are [B, L, N, D], as projections leave them, instead of [B, N, L, D].
PLUGINS = {"attention_by_heads": False, "attention_by_tokens": True}


@cache
def register() -> None:
    """Make the plugins known to TensorRT, once; the ONNX parser finds them by name and namespace.

    Raises: ImportError if tensorrt or triton are not installed.
    """
    for name, is_packed in PLUGINS.items():
        _register(name, is_packed=is_packed)


def _register(name: str, *, is_packed: bool) -> None:
    import tensorrt.plugin as trtp

    # TensorRT reads the annotations, so they are classes, not text.
    @trtp.register(f"{NAMESPACE}::{name}")  # type: ignore[untyped-decorator, unused-ignore]
    def describe(
        query: trtp.TensorDesc,
        key: trtp.TensorDesc,  # noqa: ARG001
        value: trtp.TensorDesc,  # noqa: ARG001
    ) -> trtp.TensorDesc:
        """Say that the answer is like the queries."""
        return query.like()

    @trtp.aot_impl(f"{NAMESPACE}::{name}")  # type: ignore[untyped-decorator, unused-ignore]
    def compile_kernel(
        query: trtp.TensorDesc,
        key: trtp.TensorDesc,
        value: trtp.TensorDesc,  # noqa: ARG001
        outputs: tuple[trtp.TensorDesc],  # noqa: ARG001
        tactic: int,  # noqa: ARG001
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        """Compile for the GPU at hand and the shapes of a node."""
        from fewshot_rt.kernels.ptx_triton import attention_ptx

        shapes = [_by_heads(tuple(tensor.shape), is_packed) for tensor in (query, key)]
        ptx = attention_ptx(
            architecture_here(),
            _type_of(query.dtype),
            shape=shapes[0],
            key_length=shapes[1][2],
            is_packed=is_packed,
            capability=capability_here(),
        )
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.block_x = ptx.blocks, ptx.threads
        launch.shared_mem = ptx.shared_bytes
        return ptx.name, ptx.text, launch, trtp.SymIntExprs(0)


def architecture_here() -> str:
    """Name the architecture of the GPU at hand. Raises: ValueError if the kernel has none."""
    from fewshot_rt.kernels.launches import architecture

    return architecture(capability_here())


def capability_here() -> tuple[int, int]:
    """Give the compute capability of the GPU at hand."""
    import torch

    return torch.cuda.get_device_capability()


def _by_heads(sizes: tuple[int, ...], is_packed: bool) -> tuple[int, int, int, int]:
    """Give [B, N, L, D] of a tensor in either layout."""
    batch, first, second, width = sizes
    return (batch, second, first, width) if is_packed else (batch, first, second, width)


def _type_of(dtype: object) -> str:
    import tensorrt as trt

    return {trt.DataType.BF16: "bf16", trt.DataType.HALF: "fp16"}.get(dtype, str(dtype))

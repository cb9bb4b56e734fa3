"""What tests of TensorRT's graphs share: programs of full batches, eager, and ONNX Runtime."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from fewshot_rt.bases import open_base
from fewshot_rt.export import trt_choice, trt_network, trt_runtime
from fewshot_rt.export.engines import trt
from fewshot_rt.export.onnx_trt import read_model
from fewshot_rt.export.program import Program, capture
from fewshot_rt.roles import Role, make_roles, make_signatures, run_eagerly
from fewshot_rt.spec import Signature

from . import cogvideox, ltx, wan

BATCH = 2
VERSION = (11, 4)  # of TensorRT
# By name: the module, the version, and the size (H, W) of pictures.
FAMILIES = {
    "cogvideox-1.0": (cogvideox, "1.0", (32, 48)),
    "cogvideox-1.5": (cogvideox, "1.5", (32, 48)),
    "wan-2.1": (wan, "2.1", (32, 64)),
    "wan-2.2-5B": (wan, "2.2-5B", (64, 128)),
    "wan-2.2-A14B": (wan, "2.2-A14B", (32, 64)),
    "ltx-0.9.0": (ltx, "0.9.0", (64, 96)),
    "ltx-0.9.5": (ltx, "0.9.5", (64, 96)),
}


def freeze(
    base: Any, role: str, *, frames: int, size: tuple[int, int], word: str = "a mask"
) -> tuple[Program, Role]:
    """Give the program of a role for full batches alone, and the module."""
    module, signature = cut_role(base, role, frames=frames, size=size, word=word)
    return capture(module, signature, role=role), module


def cut_role(
    base: Any, role: str, *, frames: int, size: tuple[int, int], word: str = "a mask"
) -> tuple[Role, Signature]:
    """Give the module of a role, and what it is given in full batches."""
    shape = base.geometry.latent_shape(frames=frames, height=size[0], width=size[1])
    signatures = make_signatures(
        base, base.embed(word), latents=shape, size=size, batch=BATCH, least=BATCH
    )
    return make_roles(base, signatures)[role], signatures[role]


def open_family(name: str, folder: Path, make_text_encoder: Callable[..., Any]) -> Any:
    """Open a tiny base of a family, with heads wide enough for fused attention.

    It is written into the folder, unless it is there already.
    """
    family, version, _ = FAMILIES[name]
    if (folder / name).exists():
        return open_base(str(folder / name))
    text = make_text_encoder(is_multilingual=family is wan)
    if family is ltx:
        return open_base(str(ltx.write(folder / name, version, text, head=16)))
    if family is cogvideox:
        return open_base(str(cogvideox.write(folder / name, version, text)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(wan.TRANSFORMER, "attention_head_dim", 16)
        changes = wan.VERSIONS[version]["transformer"]
        if "added_kv_proj_dim" in changes:
            patch.setitem(changes, "added_kv_proj_dim", 32)
        return open_base(str(wan.write(folder / name, version, text)))


def run_onnx(model: Path | bytes, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a graph in ONNX Runtime, each operator as it stands in it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, dict(given))
    return results


def answer(module: Role, program: Program, *, seed: int = 3) -> tuple[dict[str, Any], Any]:
    """Give an example, and what eager makes of it."""
    given = program.signature.example(seed=seed)
    return given, run_eagerly(module, program.signature, device=next(module.parameters()).device)(
        given
    )


class OnnxEngine:
    """Stands in for an engine: ONNX Runtime on a graph whose weights can be set.

    needs: by a weight, further ones that must be set with it, as an engine may ask. is_deaf: take
    weights and go on as before. pushed: the weights that were set, each time.
    """

    def __init__(self, path: Path, signature: Signature) -> None:
        self._signature, self._model = signature, read_model(path)
        self.decomposable = 0
        for node in self._model.graph.node:  # no others know what these say
            for said in [of for of in node.attribute if of.name == "TRT_decomposable"]:
                node.attribute.remove(said)
                self.decomposable += said.i
        self._places = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self.needs: dict[str, str] = {}
        self.is_deaf = False
        self.pushed: list[list[str]] = []
        self.live: Any = None

    def forget(self, names: Iterable[str]) -> None:
        """Leave weights out, as a plan does."""
        for name in names:
            tensor = self._places[name]
            blank = np.full(tuple(tensor.dims), np.nan, numpy_helper.to_array(tensor).dtype)
            tensor.CopyFrom(numpy_helper.from_array(blank, name))

    def plan(self) -> bytes:
        """Give all of it."""
        plan: bytes = self._model.SerializeToString()
        return plan

    def push(self, names: Iterable[str], fill: Callable[[str], torch.Tensor]) -> None:
        """Set weights, and those that they need."""
        asked = list(names)
        asked += [self.needs[name] for name in asked if name in self.needs]
        self.pushed.append(asked)
        for name in asked:
            weight, place = fill(name).numpy(), self._places[name]
            assert weight.dtype == numpy_helper.to_array(place).dtype
            assert weight.shape == tuple(place.dims)
            assert weight.flags.c_contiguous
            if not self.is_deaf:
                place.CopyFrom(numpy_helper.from_array(weight, name))

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer as the graph does."""
        names = [spec.name for spec in self._signature.outputs]
        return dict(zip(names, run_onnx(self.plan(), given), strict=True))


@contextmanager
def stand_in(facts: Mapping[str, str]) -> Iterator[list[dict[str, Any]]]:
    """Put ONNX Runtime in TensorRT's place; give what its builder is told."""
    told: list[dict[str, Any]] = []

    def build_plan(path: Path, signature: Signature, **of: Any) -> bytes:
        engine = OnnxEngine(path, signature)
        told.append(of | {"decomposable": engine.decomposable})
        engine.forget(of["refittable"])
        return engine.plan()

    def open_runner(path: Path, signature: Signature, *, device: str) -> OnnxEngine:
        return OnnxEngine(path, signature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt, "missing", lambda: None)
        patch.setattr(trt, "require_gpu", lambda _: None)
        patch.setattr(trt_network, "build_plan", build_plan)
        patch.setattr(trt_network, "version_here", lambda: (10, 14))
        patch.setattr(trt_runtime, "facts_here", lambda _: facts)
        patch.setattr(trt_runtime, "open_engine", lambda path, **_: path)
        patch.setattr(trt_runtime, "EngineRunner", open_runner)
        patch.setattr(trt_choice.Measured, "__call__", lambda *_: False)
        yield told

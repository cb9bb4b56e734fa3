"""References: shapes counted by hand, and valid tensors broken in one place at a time."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fewshot_rt.errors import ModelError
from fewshot_rt.spec import Geometry, Signature, TensorSpec

GEOMETRY = Geometry(
    channels=12,
    time_factor=4,
    space_factor=8,
    multiple=16,
    native=(128, 128),
    frames=(5, 9),
    known_frames=1,
)
SIGNATURE = Signature(
    inputs=(
        TensorSpec("noisy", "float32", ("batch", 4, 2, "height", 3)),
        TensorSpec("time", "float32", ("batch",)),
        TensorSpec("words", "float16", (1, 5)),
    ),
    outputs=(TensorSpec("prediction", "float32", ("batch", 4, 2, "height", 3)),),
    sizes={"batch": (1, 2, 8), "height": (1, 6, 16)},
)


@pytest.mark.parametrize(
    ("frames", "height", "width", "expected"),
    [(1, 16, 16, (12, 1, 2, 2)), (5, 128, 128, (12, 2, 16, 16)), (9, 48, 32, (12, 3, 6, 4))],
)
def test_latent_shapes(
    frames: int, height: int, width: int, expected: tuple[int, int, int, int]
) -> None:
    assert GEOMETRY.latent_shape(frames=frames, height=height, width=width) == expected


@pytest.mark.parametrize(
    ("frames", "expected", "extra"), [(5, 2, 0), (9, 4, 1), (17, 6, 1), (49, 14, 1)]
)
def test_merged_frames_are_filled_up_in_front(frames: int, expected: int, extra: int) -> None:
    geometry = replace(GEOMETRY, merged_frames=2)
    assert geometry.latent_shape(frames=frames, height=16, width=16)[1] == expected
    assert geometry.extra_frames(expected) == extra
    assert GEOMETRY.extra_frames(expected) == 0


def test_frames_whose_number_would_be_lost_in_merging_are_refused() -> None:
    geometry = replace(GEOMETRY, merged_frames=2)
    for frames in (1, 13, 21):
        with pytest.raises(ModelError, match="Use one of 5, 9"):
            geometry.latent_shape(frames=frames, height=16, width=16)


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [
        (5, 24, 16, "16x24 does not fit: both sides must be multiples of 16"),
        (5, 16, 24, "24x16 does not fit"),
        (4, 16, 16, r"4 frames do not fit: use 1 \+ a multiple of 4"),
    ],
)
def test_what_does_not_fit_a_geometry(frames: int, height: int, width: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        GEOMETRY.latent_shape(frames=frames, height=height, width=width)


def test_examples_have_the_usual_sizes_or_those_asked_for() -> None:
    shapes = {name: tensor.shape for name, tensor in SIGNATURE.example().items()}
    assert shapes == {"noisy": (2, 4, 2, 6, 3), "time": (2,), "words": (1, 5)}
    shapes = {name: t.shape for name, t in SIGNATURE.example(batch=1, height=16).items()}
    assert shapes == {"noisy": (1, 4, 2, 16, 3), "time": (1,), "words": (1, 5)}
    assert SIGNATURE.shape(SIGNATURE.outputs[0], batch=3) == (3, 4, 2, 6, 3)


def test_examples_of_bytes_take_all_values() -> None:
    image = TensorSpec("image", "uint8", ("batch", 64, 64, 3))
    signature = Signature(inputs=(image,), outputs=(), sizes={"batch": (1, 2, 4)})
    pixels = signature.example()["image"]
    assert pixels.dtype == np.uint8
    assert len(np.unique(pixels)) == 256


def test_examples_are_normal_with_times_in_range_and_depend_on_the_seed() -> None:
    example = SIGNATURE.example(batch=8, height=16)
    assert example["words"].dtype == np.float16
    assert (example["time"] > 0).all()
    assert (example["time"] < 1).all()
    assert abs(example["noisy"].mean()) < 0.1
    assert example["noisy"].std() == pytest.approx(1, abs=0.1)
    again, other = SIGNATURE.example(batch=8, height=16), SIGNATURE.example(batch=8, seed=1)
    np.testing.assert_array_equal(example["noisy"], again["noisy"])
    assert not np.array_equal(example["time"], other["time"])


def test_varying_axes() -> None:
    found = [list(SIGNATURE.varying(spec)) for spec in SIGNATURE.inputs]
    assert found == [[(0, "batch"), (3, "height")], [(0, "batch")], []]


@pytest.mark.parametrize("sizes", [{}, {"batch": 1, "height": 1}, {"batch": 8, "height": 16}])
def test_what_fits_passes(sizes: dict[str, int]) -> None:
    example = SIGNATURE.example(**sizes)
    SIGNATURE.check(example)
    SIGNATURE.check({name: torch.from_numpy(tensor) for name, tensor in example.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"words": None},
            r"expected tensors \['noisy', 'time', 'words'\], got \['noisy', 'time'\]",
        ),
        ({"extra": (1,)}, "got .*'extra'"),
        ({"time": (2, 1)}, r"time: expected axes \('batch',\), got shape \(2, 1\)"),
        ({"words": (1, 6)}, r"words: axes \(1, 5\) do not admit \(1, 6\)"),
        ({"noisy": (9, 4, 2, 6, 3), "time": (9,)}, "noisy: axes .* do not admit"),
        ({"noisy": (2, 4, 2, 0, 3)}, "noisy: axes"),
        ({"noisy": (3, 4, 2, 6, 3)}, r"time: axes \('batch',\) do not admit \(2,\)"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, tuple[int, ...] | None], message: str
) -> None:
    tensors = SIGNATURE.example() | {n: np.zeros(s) for n, s in changes.items() if s is not None}
    tensors = {n: t for n, t in tensors.items() if changes.get(n, ()) is not None}
    with pytest.raises(ModelError, match=message):
        SIGNATURE.check(tensors)


def test_a_signature_survives_json() -> None:
    values: dict[str, Any] = json.loads(json.dumps(SIGNATURE.to_dict()))
    assert Signature.from_dict(values) == SIGNATURE

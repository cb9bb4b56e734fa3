"""References: closed forms of relative L2, cosine and greatest difference."""

import math

import numpy as np
import pytest
import torch

from fewshot_rt.errors import ConfigError, EngineError
from fewshot_rt.export.parity import TOLERANCES, Parity, compare, require, worst


def test_figures_against_closed_forms() -> None:
    parity = compare({"x": np.array([3.0, 0.0])}, {"x": np.array([3.0, 4.0])})["x"]
    assert parity == Parity(rel_l2=4 / 3, max_abs=4.0, cosine=3 / 5, nan=0)


def test_a_tensor_equals_itself_in_either_library() -> None:
    values = np.random.default_rng(0).normal(size=(1, 3, 5)).astype(np.float32)
    parity = compare({"x": values}, {"x": torch.from_numpy(values)})["x"]
    assert parity == Parity(rel_l2=0.0, max_abs=0.0, cosine=1.0, nan=0)


def test_a_reference_of_zeros() -> None:
    zeros = {"x": np.zeros(3, np.float32)}
    assert compare(zeros, zeros)["x"].rel_l2 == 0.0
    assert compare(zeros, {"x": np.ones(3, np.float32)})["x"].rel_l2 == math.inf


def test_every_value_that_is_not_finite_is_counted_and_refused() -> None:
    good = np.ones(4)
    for bad in (np.nan, np.inf):
        poisoned = good.copy()
        poisoned[1:3] = bad
        for pair in ((good, poisoned), (poisoned, good)):
            parities = compare({"x": pair[0]}, {"x": pair[1]})
            assert parities["x"].nan == 2
            with pytest.raises(EngineError, match=r"decoder: 2 values of 'x' are not finite"):
                require(parities, role="decoder", tolerance="bf16")


@pytest.mark.parametrize("tolerance", sorted(TOLERANCES))
def test_the_limit_is_where_the_table_says(tolerance: str) -> None:
    limit, reference = TOLERANCES[tolerance], {"x": np.array([1.0, 0.0])}
    require(compare(reference, {"x": np.array([1.0, 0.9 * limit])}), role="r", tolerance=tolerance)
    with pytest.raises(
        EngineError, match=rf"denoiser: 'x' differs.*{tolerance} allows {limit:.0e}"
    ):
        require(
            compare(reference, {"x": np.array([1.0, 1.1 * limit])}),
            role="denoiser",
            tolerance=tolerance,
        )


def test_the_table_is_the_one_of_the_house() -> None:
    exact = {"fp32": 1e-5, "merged": 1e-5}
    assert exact | {"fp16": 2e-3, "bf16": 1e-2, "int8": 2e-2, "fp8": 5e-2} == TOLERANCES


def test_other_names_shapes_and_lines_are_refused() -> None:
    one = {"x": np.ones(2)}
    with pytest.raises(EngineError, match=r"expected tensors \['x'\], got \['y'\]"):
        compare(one, {"y": np.ones(2)})
    with pytest.raises(EngineError, match=r"x: expected shape \(2,\), got \(1, 2\)"):
        compare(one, {"x": np.ones((1, 2))})
    with pytest.raises(ConfigError, match=r"unknown tolerance 'fp23'\. Did you mean 'fp32'"):
        require(compare(one, one), role="r", tolerance="fp23")


def test_worst_takes_the_greatest_error_and_nan_above_all() -> None:
    def parity(rel_l2: float, nan: int = 0) -> Parity:
        return Parity(rel_l2=rel_l2, max_abs=0.0, cosine=1.0, nan=nan)

    groups = [{"x": parity(1e-3), "y": parity(0)}, {"x": parity(2e-3), "y": parity(math.nan, 1)}]
    found = worst([*groups, {"x": parity(1e-4), "y": parity(9.0)}])
    assert found["x"].rel_l2 == 2e-3
    assert found["y"].nan == 1

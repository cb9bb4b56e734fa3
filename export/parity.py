"""How close a candidate comes to its reference, and the one table of how close it must come."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fewshot_rt.errors import ConfigError, EngineError, unknown

Array = Any  # numpy.ndarray, or a torch.Tensor on the CPU without gradients

# Greatest relative L2 error; loosen one only with the reason beside it.
TOLERANCES = {
    "fp32": 1e-5,  # engine against eager in the same precision: other orders of summation
    "fp16": 2e-3,  # two roundings of 2^-11 through a residual network
    "bf16": 1e-2,  # two roundings of 2^-8
    "int8": 2e-2,  # each layer rounds tokens to 1/127 of their greatest value: 4 times bf16's
    "fp8": 5e-2,  # three bits of mantissa: each layer rounds tokens by up to 2^-4
    "merged": 1e-5,  # merged against attached adapter, fp32
}
# Kernel against the fp32 reference: at most this many times the error of torch in the same dtype.
KERNEL_RATIO = 2.0


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How one tensor compares with its reference.

    rel_l2: ||candidate - reference|| / ||reference||. max_abs: in the tensor's unit. cosine: of the
    angle between both. nan: how many values, of both together, are not finite; the figures are NaN
    then.
    """

    rel_l2: float
    max_abs: float
    cosine: float
    nan: int

    def to_dict(self) -> dict[str, float]:
        """Give the fields as JSON values."""
        return asdict(self)


def compare(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> dict[str, Parity]:
    """Compare named tensors one by one.

    Raises: EngineError if names or shapes differ.
    """
    if set(reference) != set(candidate):
        raise EngineError(f"expected tensors {sorted(reference)}, got {sorted(candidate)}")
    return {name: _compare(name, reference[name], candidate[name]) for name in reference}


def require(parities: Mapping[str, Parity], *, role: str, tolerance: str) -> None:
    """Require that every tensor comes as close as a line of `TOLERANCES` asks.

    Raises: EngineError naming role, tensor, figure and limit; ConfigError for an unknown line.
    """
    if tolerance not in TOLERANCES:
        raise ConfigError(unknown("tolerance", tolerance, TOLERANCES))
    limit = TOLERANCES[tolerance]
    for name, parity in parities.items():
        if parity.nan:
            raise EngineError(
                f"{role}: {parity.nan} values of {name!r} are not finite. The model or the engine "
                "is broken; train again, or choose another engine."
            )
        # Written so that a figure which is NaN fails.
        if not parity.rel_l2 <= limit:
            raise EngineError(
                f"{role}: {name!r} differs from eager by {parity.rel_l2:.1e} (relative L2), and "
                f"{tolerance} allows {limit:.0e}. Choose another engine or precision."
            )


def worst(parities: Sequence[Mapping[str, Parity]]) -> dict[str, Parity]:
    """Give, for each tensor, its worst comparison by relative L2; one with NaN is worst of all."""
    result: dict[str, Parity] = {}
    for group in parities:
        for name, parity in group.items():
            if name not in result or _badness(parity) > _badness(result[name]):
                result[name] = parity
    return result


def _badness(parity: Parity) -> tuple[int, float]:
    return parity.nan, 0.0 if parity.nan else parity.rel_l2


def _compare(name: str, reference: Array, candidate: Array) -> Parity:
    expected, given = (np.asarray(x, dtype=np.float64) for x in (reference, candidate))
    if expected.shape != given.shape:
        raise EngineError(f"{name}: expected shape {expected.shape}, got {given.shape}")
    bad = int((~np.isfinite(expected)).sum() + (~np.isfinite(given)).sum())
    if bad:
        return Parity(rel_l2=np.nan, max_abs=np.nan, cosine=np.nan, nan=bad)
    difference = given - expected
    size, error = float(np.linalg.norm(expected)), float(np.linalg.norm(difference))
    product = size * float(np.linalg.norm(given))
    same = error == 0.0
    return Parity(
        rel_l2=0.0 if same else error / size if size else np.inf,
        max_abs=float(np.abs(difference).max(initial=0.0)),
        cosine=1.0 if same else float(np.vdot(expected, given)) / product if product else 0.0,
        nan=0,
    )

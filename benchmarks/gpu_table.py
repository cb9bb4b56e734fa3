"""What `make gpu` prints last: short tables of its records, and which aims are met."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import gpu_answer, gpu_attention, gpu_checks, gpu_denoiser, gpu_launches
from .gpu_units import Outcome
from .markdown import table
from .record import Record

PEAK_SHARE, FP8_GAIN, ANSWER_GAIN = 0.65, 1.3, 300.0
AIM_BATCH, AIM_WIDTH = 4, 64
FASTEST = 8  # launches that are shown
REHEARSED = "A rehearsal at tiny sizes on the CPU: no figure below is a measurement."
Row = Sequence[str]
Aim = tuple[str, str, str, bool]  # what is aimed at, of what, what was found, whether it is met


def show(outcomes: Sequence[Outcome], *, is_rehearsal: bool) -> str:
    """Make all tables of what was measured, and list what was not."""
    records = [outcome.record for outcome in outcomes if outcome.record]
    parts = [
        _table("checks", ("check", "figures"), _checks(_of(records, gpu_checks.KIND))),
        _attentions(_of(records, gpu_attention.KIND)),
        _table(
            "launches of our attention",
            ("size", "launch", "ms (p10 to p90)", "TFLOP/s"),
            _launches(_of(records, gpu_launches.KIND)),
        ),
        _table(
            "denoisers",
            ("base", "batch", "way", "ms (p10 to p90)", "TFLOP/s", "of bf16 peak", "error"),
            _denoisers(_of(records, gpu_denoiser.KIND)),
        ),
        _table(
            "answers, file to file",
            ("base", "part", "way", "ms (p10 to p90)"),
            _answers(_of(records, gpu_answer.KIND)),
        ),
        _missing(outcomes),
        _table("aims", ("aim", "of", "found", "verdict"), list(_aims(records, is_rehearsal))),
    ]
    heading = [REHEARSED] if is_rehearsal else []
    return "\n\n".join([*heading, *(part for part in parts if part)])


def _of(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record.kind == kind]


def _table(title: str, headings: Row, rows: Sequence[Row]) -> str:
    return f"{title}\n\n{table(headings, rows)}" if rows else ""


def _checks(records: Sequence[Record]) -> list[Row]:
    return [
        (record.case, ", ".join(f"{k} {v:.3g}" for k, v in figures.items()))
        for record in records
        for figures in record.variants.values()
    ]


def _attentions(records: Sequence[Record]) -> str:
    """Make a table with a row for each size and a column for each way, in TFLOP/s."""
    names = list(dict.fromkeys(name for record in records for name in record.variants))
    rows = [
        (
            record.case.removeprefix("attention, "),
            *(
                f"{record.variants[name]['tflops']:.3g}" if name in record.variants else "-"
                for name in names
            ),
        )
        for record in records
    ]
    return _table("attention, TFLOP/s", ("size", *names), rows)


def _launches(records: Sequence[Record]) -> list[Row]:
    """List the fastest ways of each size."""
    return [
        (
            record.case.removeprefix("launches, "),
            name,
            _times(times),
            f"{times['tflops']:.3g}",
        )
        for record in records
        for name, times in sorted(
            record.variants.items(), key=lambda variant: variant[1]["median_ms"]
        )[:FASTEST]
    ]


def _denoisers(records: Sequence[Record]) -> list[Row]:
    return [
        (
            _short(record),
            str(record.images),
            name,
            _times(times),
            f"{times['tflops']:.3g}",
            f"{times['of_bf16_peak']:.0%}",
            f"{record.parity[name]['rel_l2']:.1e}",
        )
        for record in records
        for name, times in record.variants.items()
    ]


def _answers(records: Sequence[Record]) -> list[Row]:
    return [
        (_short(record), record.settings["part"], name, _times(times))
        for record in records
        for name, times in record.variants.items()
    ]


def _times(times: Mapping[str, float]) -> str:
    """Give the median in milliseconds with p10 and p90, or what was only told from others."""
    if "extrapolated_ms" in times:
        return f"{times['extrapolated_ms']:.0f}, not measured"
    median, low, high = (f"{times[name]:.4g}" for name in ("median_ms", "p10_ms", "p90_ms"))
    return median if times["count"] == 1 else f"{median} ({low} to {high})"


def _short(record: Record) -> str:
    return record.case.rpartition("/")[2]


def _missing(outcomes: Sequence[Outcome]) -> str:
    """List what failed, or was skipped."""
    lines = [f"{outcome.case}: {outcome.reason}" for outcome in outcomes if outcome.reason]
    for outcome in outcomes:
        settings: Mapping[str, Any] = outcome.record.settings if outcome.record else {}
        for what in ("failed", "skipped"):
            lines += [f"{outcome.case}, {n}: {t}" for n, t in settings.get(what, {}).items()]
    if not lines:
        return ""
    return "\n".join(["not measured", "", *(f"- {line}" for line in dict.fromkeys(lines))])


def _aims(records: Sequence[Record], is_rehearsal: bool) -> Iterator[Row]:
    """Compare what was measured with what is aimed at; a rehearsal leaves all open."""
    found = [
        *_denoiser_aims(_of(records, gpu_denoiser.KIND)),
        *_attention_aims(records),
        *_answer_aims(_of(records, gpu_answer.KIND)),
    ]
    for aim, of, value, is_met in found:
        verdict = "met" if is_met else "not met"
        yield (aim, of, "-", "open") if is_rehearsal else (aim, of, value, verdict)


def _denoiser_aims(records: Sequence[Record]) -> Iterator[Aim]:
    for record in records:
        if record.images < AIM_BATCH:
            continue
        of, fp8 = f"{_short(record)}, batch {record.images}", f" {gpu_denoiser.FP8}"
        ways = {n: t for n, t in record.variants.items() if not n.endswith(fp8)}
        if not any(gpu_denoiser.GRAPH in name for name in ways):
            continue  # other compilers, to compare with
        best = max(ways, key=lambda name: ways[name]["of_bf16_peak"])
        share = ways[best]["of_bf16_peak"]
        yield f"{PEAK_SHARE:.0%} of the bf16 peak", of, f"{share:.0%} ({best})", share >= PEAK_SHARE
        for name, times in record.variants.items():
            if name.endswith(fp8) and name.removesuffix(fp8) in ways:
                gain = ways[name.removesuffix(fp8)]["median_ms"] / times["median_ms"]
                yield f"fp8 {FP8_GAIN:g} x bf16", of, f"{gain:.2f} x", gain >= FP8_GAIN


def _attention_aims(records: Sequence[Record]) -> Iterator[Aim]:
    """Our kernel is level with cuDNN, or else the graphs that have such heads keep torch's."""
    ours, cudnn = gpu_attention.OURS, gpu_attention.CUDNN
    gains = {}
    for record in _of(records, gpu_attention.KIND):
        if record.settings.get("width") == AIM_WIDTH and {ours, cudnn} <= set(record.variants):
            times = (record.variants[name]["median_ms"] for name in (cudnn, ours))
            gains[record.case] = next(times) / next(times)
    if not gains:
        return
    chosen = {
        record.settings["attention"]
        for record in _of(records, gpu_denoiser.KIND)
        if record.settings.get("head_width") == AIM_WIDTH
    }
    worst = min(gains, key=lambda case: gains[case])
    is_level, is_left = gains[worst] >= 1, chosen == {"torch"}
    value = f"{gains[worst]:.2f} x" + (", graphs keep torch's" if is_left else "")
    yield f"our attention level with cuDNN at head {AIM_WIDTH}", worst, value, is_level or is_left


def _answer_aims(records: Sequence[Record]) -> Iterator[Aim]:
    """Compare our fastest answer with the paper's setting: all of its steps, or what few tell."""
    for case in dict.fromkeys(record.case for record in records):
        ours, paper = {}, {}
        for record in (record for record in records if record.case == case):
            for name, times in record.variants.items():
                if record.settings["part"] in (gpu_answer.OWN, gpu_answer.TINY):
                    if gpu_answer.OFFICIAL not in name:
                        ours[f"{name}, {record.settings['part']}"] = times["median_ms"]
                elif "extrapolated_ms" in times:
                    paper["told from few steps"] = times["extrapolated_ms"]
                elif record.settings["part"] == gpu_answer.WHOLE:
                    paper["measured"] = times["median_ms"]
        if ours and paper:
            best = min(ours, key=lambda name: ours[name])
            how = "measured" if "measured" in paper else next(iter(paper))
            gain = paper[how] / ours[best]
            value = f"{gain:.0f} x ({best}; the paper's {how})"
            yield f"{ANSWER_GAIN:g} x less time than the paper's", case, value, gain >= ANSWER_GAIN

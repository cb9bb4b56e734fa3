"""Pictures of figures over figures: a panel for each title, a line for each series."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewshot_rt.errors import DataError

Point = tuple[float, float, float, float]  # across, mean, least, greatest
Panels = Mapping[str, Mapping[str, Sequence[Point]]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How panels look. limits: of the vertical axis; None fits each panel to its points."""

    columns: int
    across: str
    up: str
    ticks: tuple[int, ...]
    limits: tuple[float, float] | None = None


def require_plots() -> None:
    """Require what drawing takes, before hours are spent on measuring.

    Raises: DataError if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DataError(
            "pictures of figures need the package 'matplotlib', which is not installed. "
            "Install fewshot-rt[demo]."
        ) from error


def draw_panels(panels: Panels, path: Path, *, layout: Layout) -> None:
    """Draw lines with bands from the least to the greatest; the first series is drawn strongest.

    Raises: ImportError if matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    columns = layout.columns
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    drawn = {}
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for name, points in series.items():
            number = names.index(name)
            across, mean, low, high = zip(*points, strict=True)
            width = 1.2 if number else 2.5
            (drawn[name],) = axis.plot(across, mean, "o-", ms=3, lw=width, color=f"C{number}")
            if len(points) > 1:
                axis.fill_between(across, low, high, color=f"C{number}", alpha=0.15, lw=0)
            else:
                axis.vlines(across, low, high, color=f"C{number}", lw=1)
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log")
        axis.set_xticks(layout.ticks, [str(tick) for tick in layout.ticks])
        axis.minorticks_off()
        if layout.limits:
            axis.set_ylim(*layout.limits)
            axis.axhline(0, color="0.7", lw=0.8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].legend(
        [drawn[n] for n in names if n in drawn], [n for n in names if n in drawn], fontsize=7
    )
    figure.supxlabel(layout.across)
    figure.supylabel(layout.up)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

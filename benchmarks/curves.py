"""Learning records together: tables of tasks and methods, and curves over the number of pairs.

Figures are skills: 1 - error / error of the best baseline (copy, mean target, nearest pair, Otsu's
threshold for masks), with the squared error of pictures; 1 is perfect, 0 no better than a baseline,
below -1 counts as -1.
Source: Murphy 1988 (skill scores).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .markdown import table
from .plots import Layout, draw_panels
from .record import Record

KIND = "learning"  # of records
BASELINES = ("copy", "mean target", "nearest pair", "otsu")
LEAST_SKILL = -1.0
# Skills by task, method and number of pairs, each by seed.
Skills = Mapping[tuple[str, str, int], dict[int, float]]


def latest_comparison(records: Sequence[Record], *, kind: str = KIND) -> list[Record]:
    """Take the records of a kind that belong together with the newest: one base, one protocol.

    Of a task measured twice with one number of pairs and one seed, the newest record counts.
    """
    records = [record for record in records if record.kind == kind]
    if not records:
        return []
    own = ("group", "moves", "codec", "metric", "shots", "seed")

    def shared(record: Record) -> dict[str, Any]:
        return {key: value for key, value in record.settings.items() if key not in own}

    newest = shared(max(records, key=lambda record: record.date))
    together = {}
    for record in sorted(records, key=lambda record: record.date):
        if shared(record) == newest:
            settings = record.settings
            together[record.case, settings["shots"], settings["seed"]] = record
    return list(together.values())


def find_skills(records: Iterable[Record]) -> Skills:
    """Give the skill of every method in every record."""
    skills: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for record in records:
        variants, settings = record.variants, record.settings
        best = min(variants[name]["error"] for name in BASELINES if name in variants)
        for name, values in variants.items():
            skill = 1 - values["error"] / max(best, 1e-9)
            key = (record.case, name, int(settings["shots"]))
            skills[key][int(settings["seed"])] = max(LEAST_SKILL, skill)
    return skills


def make_task_table(records: Sequence[Record], *, shots: int) -> str:
    """Make a Markdown table: a row for each task at a number of pairs, its own metric by method.

    Raises: ValueError if there is no record with so many pairs.
    """
    chosen = _of_shots(records, shots)
    methods = _methods(chosen)
    rows = []
    for case in dict.fromkeys(record.case for record in chosen):
        same = [record for record in chosen if record.case == case]
        metric = same[0].settings["metric"]
        cells = [_spread([r.variants[m][metric] for r in same if m in r.variants]) for m in methods]
        rows.append([case, metric, *cells])
    return table(["task", "metric", *methods], rows, left=2)


def make_mean_table(records: Sequence[Record]) -> str:
    """Make a Markdown table of mean skills, methods by numbers of pairs.

    A method counts only where it answered all tasks with that number of pairs (the forest: masks).
    """
    skills = find_skills(records)
    counts = sorted({shots for _, _, shots in skills})
    tasks = {shots: _tasks(skills, shots) for shots in counts}
    rows = [
        [method, *(_mean_skill(skills, method, tasks[shots], shots) for shots in counts)]
        for method in _methods(records)
    ]
    found = ", ".join(f"{len(tasks[shots])} with {_pairs(shots)}" for shots in counts)
    headings = ["mean skill", *(_pairs(n) for n in counts)]
    return f"{_filled(headings, rows)}\n\nTasks: {found}; {_protocol(records)}"


def make_group_table(records: Sequence[Record], *, shots: int) -> str:
    """Make a Markdown table of mean skills with a number of pairs, methods by groups of tasks.

    Besides the groups that tasks belong to: masks, and places (what is seen moves).
    Raises: ValueError if there is no record with so many pairs.
    """
    records = _of_shots(records, shots)
    skills = find_skills(records)
    groups: dict[str, list[str]] = {"all": _tasks(skills, shots)}
    for record in records:
        settings = record.settings
        marks = {"masks": settings["metric"] == "iou", "places": settings["moves"]}
        for group in (settings["group"], *(mark for mark, is_so in marks.items() if is_so)):
            if record.case not in groups.setdefault(group, []):
                groups[group].append(record.case)
    rows = [
        [method, *(_mean_skill(skills, method, tasks, shots) for tasks in groups.values())]
        for method in _methods(records)
    ]
    headings = ["mean skill", *(f"{group} ({len(tasks)})" for group, tasks in groups.items())]
    return f"{_filled(headings, rows)}\n\n{_pairs(shots)}; {_protocol(records)}"


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """Draw skill over the number of pairs, a panel for each task and one for their mean.

    Raises: ImportError if matplotlib is not installed.
    """
    skills = find_skills(records)
    tasks = list(dict.fromkeys(record.case for record in records))
    methods = [name for name in _methods(records) if name not in BASELINES]
    panels = {"mean over all tasks": tasks} | {task: [task] for task in tasks}
    lines = {
        title: {m: points for m in methods if (points := _points(skills, m, chosen))}
        for title, chosen in panels.items()
    }
    layout = Layout(
        columns=4,
        across="pairs",
        up="skill: 1 - error / error of the best baseline",
        ticks=(1, 3, 10, 30),
        limits=(LEAST_SKILL - 0.05, 1.05),
    )
    draw_panels(lines, path, layout=layout)


def _points(
    skills: Skills, method: str, tasks: Sequence[str]
) -> list[tuple[int, float, float, float]]:
    """Give pairs, mean, least and greatest over the seeds that all tasks have, if there are any."""
    points = []
    for shots in sorted({key[2] for key in skills}):
        found = [skills[task, method, shots] for task in tasks if (task, method, shots) in skills]
        seeds = set.intersection(*map(set, found)) if len(found) == len(tasks) else ()
        if not seeds:
            continue
        means = np.array([np.mean([values[seed] for values in found]) for seed in sorted(seeds)])
        points.append((shots, float(means.mean()), float(means.min()), float(means.max())))
    return points


def _of_shots(records: Sequence[Record], shots: int) -> list[Record]:
    chosen = [record for record in records if record.settings["shots"] == shots]
    if not chosen:
        raise ValueError(f"there is no record with {_pairs(shots)}")
    return chosen


def _tasks(skills: Skills, shots: int) -> list[str]:
    return sorted({case for case, _, count in skills if count == shots})


def _filled(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Make a table of the rows that say anything."""
    return table(headings, [row for row in rows if any(row[1:])])


def _protocol(records: Sequence[Record]) -> str:
    first = records[0].settings
    cells = Counter((record.case, record.settings["shots"]) for record in records)
    least, most = min(cells.values()), max(cells.values())
    seeds = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"{first['size']}x{first['size']} pixels, {first['test']} test images each, "
        f"{seeds} seed{'s' * (most > 1)}, {first['steps']} steps; base {first['base']} "
        f"{first['revision']}, commit {records[0].commit or 'unknown'}."
    )


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count > 1)}"


def _mean_skill(skills: Skills, method: str, tasks: Sequence[str], shots: int) -> str:
    points = [point for point in _points(skills, method, tasks) if point[0] == shots]
    if not points:
        return ""
    _, mean, low, high = points[0]
    return f"{mean:.2f}" if low == high else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _methods(records: Iterable[Record]) -> list[str]:
    """List who answered, ours first, in the order of the records."""
    return list(dict.fromkeys(name for record in records for name in record.variants))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    places = 1 if max(values) > 1 else 3
    mean = f"{np.mean(values):.{places}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values):.{places}f}"

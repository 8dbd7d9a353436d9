"""Plain data of studies and candidates -> tables for the terminal: what `status`, `run` and `show` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.cli.output import column_width, duration

_PARENTS = 6  # that all have a row in a folded table
_BARS = "▁▂▃▄▅▆▇█"
_CELL = 9  # columns of a coefficient with its bar
_ROWS = 40  # of coefficients that are shown
NO_STUDIES = "no studies here; start one with: evomerge run CONFIG"


def line_of_study(row: Mapping[str, Any]) -> str:
    """One line for a study among others.

    Args:
        row: As `evomerge.reports.study_summary` gives it.

    Returns:
        The line.
    """
    return f"{row['study']}: {row['state']}, {row['evaluations']} evaluations, {_best_or_damage(row)}"


def study_table(data: Mapping[str, Any], whole: bool = False) -> str:
    """A header, where the search stands or what it found in one sentence, and the table of scores.

    Args:
        data: As `evomerge.reports.study_summary` gives it.
        whole: Whether all parents and hand recipes have a row, else the strongest.

    Returns:
        The text.
    """
    lines = [*headline(data), *_metric_lines(data["metrics"]), ""]
    rows, folded = (list(data["references"]), 0) if whole else _folded(data)
    if data["best"]:
        best = data["best"]
        kind = "no winner, one of equals" if data["alike"] else "best"
        rows.insert(0, best | {"label": f"{kind}: {data['study']}/{best['id']} ({best['origin']})"})
    labels = [str(row["label"] or row["id"]) for row in rows]
    width = column_width(labels, 34)
    lines.append(f"{'':{width}}{'search':>8}{'valid.':>8}{'test':>8}   lead of the best")
    for label, row in zip(labels, rows, strict=True):
        numbers = "".join(f"{_number(row.get(key)):>8}" for key in ("search", "validation", "test"))
        lead = f"   {row['lead']:+.3f} ± {row['lead_error']:.3f}" if "lead" in row else ""
        error = f"   {row['error']}" if row.get("error") else ""
        lines.append(f"{label:{width}}{numbers}{lead}{error}")
    if folded:
        lines.append(f"{folded} other parents and hand recipes: evomerge status {data['study']} --all")
    return "\n".join([*lines, *_conclusions(data)])


def headline(data: Mapping[str, Any]) -> list[str]:
    """State, and the verdict of a finished search; of another its best so far, its pace and what it has cost.

    Args:
        data: As `evomerge.reports.study_summary` gives it.

    Returns:
        Two to four lines.
    """
    figures = data["figures"]
    evaluations, budget = figures["evaluations"] or data["evaluations"], figures["budget"]
    is_over = data["state"] == "done" or budget is None or evaluations > budget
    count = f"{data['evaluations']} evaluations" if is_over else f"{evaluations} of {budget} evaluations"
    generations = f"{count} in {data['generations']} generations"
    lines = [
        f"{data['study']}: {data['state']}, {generations}, {data['failed']} failed, "
        f"seed {data['seed']}, store {data['store']}"
    ]
    if data["verdict"]["sentence"]:
        return [*lines, data["verdict"]["sentence"], f"used: {spent(figures)}"]
    if figures["best"] is not None:
        lines.append(f"best so far: {best_so_far(figures)}")
    if data["state"] == "running":
        lines.append(f"pace: {pace(figures)}")
    return [*lines, f"used: {spent(figures)}"]


def best_so_far(figures: Mapping[str, Any]) -> str:
    """The best candidate of a search that runs: its score, which it is, its lead over the best parent.

    Args:
        figures: `figures` of a study's summary, with a best candidate.

    Returns:
        Such as '0.612 ± 0.021 (candidate 57), +0.034 ± 0.028 over the best parent 'math''.
    """
    best, parent = figures["best"], figures["parent"]
    name = f"{best['origin']} '{best['label']}'" if best["origin"] in ("parent", "hand") else ""
    text = f"{_with_error(best['score'], best['error'], '.3f')} ({name or 'candidate ' + str(best['id'])})"
    if figures["lead"] is not None:
        lead = _with_error(figures["lead"], figures["lead_error"], "+.3f")
        text += f", {lead} over the best parent '{parent['label']}'"
    if best["violation"]:
        text += f", breaks keep by {best['violation']:.3f}"
    return text


def pace(figures: Mapping[str, Any]) -> str:
    """Rate and time left.

    Args:
        figures: `figures` of a study's summary.

    Returns:
        Such as '120 candidates an hour, about 3.5 h to the end'.
    """
    if figures["rate"] is None:
        return "known after the first generation"
    parts = [f"{figures['rate']:,.{0 if figures['rate'] >= 10 else 1}f} candidates an hour"]
    if figures["eta"]:
        of = "" if figures["stages"] == 1 else f" of stage {figures['stage']} of {figures['stages']}"
        parts.append(f"about {duration(figures['eta'])} to the end{of}")
    return ", ".join(parts)


def spent(figures: Mapping[str, Any]) -> str:
    """What a search has used up, beside the limits that it was given.

    Args:
        figures: `figures` of a study's summary.

    Returns:
        Such as '2.13 GPU hours of 8, cost 4.26 of 16'.
    """
    limits = figures["limits"]
    hours = "GPU hours" if figures["on_gpu"] else "worker hours"
    parts = [f"{figures['gpu_hours']:.2f} {hours}{_limit(limits['gpu_hours'])}"]
    if limits["price"]:
        parts.append(f"cost {figures['cost']:.2f}{_limit(limits['cost'])}")
    return ", ".join(parts)


def _limit(limit: float | None) -> str:
    return "" if limit is None else f" of {limit:g}"


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:.3f}"


def _folded(data: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], int]:
    """(all parents and the best hand recipe, in their order; how many rows are left out)."""
    from evomerge.reports.verdict import strongest_references

    rows = list(data["references"])
    parents = [row for row in rows if row["origin"] == "parent"]
    strongest = [row for row in strongest_references(data) if row is not None]
    kept = [*(parents if len(parents) <= _PARENTS else []), *strongest]
    shown = [row for row in rows if any(row is other for other in kept)]
    return shown, len(rows) - len(shown)


def _metric_lines(metrics: Mapping[str, str]) -> list[str]:
    """What is scored of each task, where an answer is filtered: without that the metric's name says it."""
    filtered = [f"{task} by {name}" for task, name in metrics.items() if ", " in name]
    return [f"scored: {'; '.join(filtered)}"] if filtered else []


def candidate_text(data: Mapping[str, Any], whole: bool = False) -> str:
    """One candidate: where it comes from, its scores, and how much of each model it takes.

    Args:
        data: As `evomerge.reports.candidate` gives it.
        whole: Whether all rows of coefficients are shown, else the first.

    Returns:
        The text, several lines.
    """
    from evomerge.reports.learned_stages import agreement_line

    name = f" '{data['label']}'" if data["label"] else ""
    place = f"generation {data['generation']}, slot {data['slot']}"
    lines = [f"candidate {data['id']}{name}: {data['origin']}, {place}, recipe {data['recipe']}"]
    if data["partial"]:
        lines.append(f"{_race_result(data['dropped'])}, partial: {data['partial']}")
    if data["costs"]:
        costs = data["costs"]
        lines.append(f"{costs['layers']:.0f} layers, {costs['parameters']:,.0f} parameters")
    if data["route"]:
        lines.append(f"route: {data['route']}")
    lines += [f"{method} in {places}" for method, places in data["methods"].items()]
    if data["violation"]:
        lines.append(f"breaks the search's keep by {data['violation']:.4f}")
    if data["estimate"]:
        mean, error = data["estimate"]
        lines.append(f"estimate over all search items: {mean:.3f} ± {error:.3f}")
    if data["parents"]:
        lines.append(f"recombined from: {', '.join(str(p) for p in data['parents'])}")
    for score in data["scores"]:
        lines += _score_lines(score)
    lines += [f"stage {row['stage']}: {agreement_line(row)}" for row in data["agreements"]]
    return "\n".join([*lines, *_coefficient_lines(data["coefficients"], whole)])


def _coefficient_lines(data: Mapping[str, Any], whole: bool) -> list[str]:
    """A small heat map: a row for each group of layers and component, a number with a bar for each model."""
    rows, models = data["rows"], data["models"]
    shown = rows if whole else rows[:_ROWS]
    wide = column_width([name for name, _ in shown], 12)
    widths = [max(_CELL, len(model) + 2) for model in models]
    high = max((abs(value) for _, values in rows for value in values), default=0.0) or 1.0
    heading = "".join(f"{model:>{width}}" for model, width in zip(models, widths, strict=True))
    lines = ["", f"{'how much of':{wide}}{heading}"]
    for name, values in shown:
        cells = "".join(
            f"{f'{value:.2f} {_bar(value, high)}':>{width}}"
            for value, width in zip(values, widths, strict=True)
        )
        lines.append(f"{name:{wide}}{cells}")
    if len(shown) < len(rows):
        lines.append(f"{len(rows) - len(shown)} more rows: --all")
    return lines


def _bar(value: float, high: float) -> str:
    """The size of a coefficient beside the largest one."""
    return _BARS[round(abs(value) / high * (len(_BARS) - 1))]


def _race_result(dropped: int | None) -> str:
    if dropped:
        return f"dropped by the race after rung {dropped}"
    return "sure to be among the best of its generation before its end"


def _score_lines(score: Mapping[str, Any]) -> list[str]:
    """The scores of one role: the objective, the tasks' metrics and soft metrics."""
    if score.get("error"):
        return [f"{score['role']}: failed: {score['error']}"]
    metrics, soft = [], []
    for name, value in score["metrics"].items():
        if ":" in name:
            soft.append(f"{name.replace(':', ' ')} {value:.4f}")
        else:
            metrics.append(f"{name} {value:.4f}")
    items = f"{score['items']} items ({', '.join(metrics)})"
    seconds = sum(score["seconds"].values())
    lines = [f"{score['role']}: {_number(score['objective'])} on {items} in {seconds:.2f} s"]
    return [*lines, f"  right answers: {', '.join(soft)}"] if soft else lines


def _conclusions(data: Mapping[str, Any]) -> list[str]:
    """What follows the table: the winner's interval and bias, skills lost, front, partial scores."""
    from evomerge.reports import lost_skills, test_item_uses
    from evomerge.reports.learned_stages import agreement_line
    from evomerge.reports.stages import stage_sentences

    best, lines = data["best"] or {}, [""]
    lines += [data["alike"]] if data["alike"] else []
    lines += stage_sentences(data["stages"])
    if "test_interval" in best:
        low, high = best["test_interval"]
        bias = ""
        if "luck" in best:
            bias = f"; search - test {best['luck']:+.3f} ± {best['luck_error']:.3f} (selection bias)"
        lines.append(f"test score of the best, 95 % interval: {low:.3f} to {high:.3f}{bias}")
    lines += [f"without a signal before the search: {sentence}" for sentence in data["flat"]]
    if uses := test_item_uses(data):
        lines.append(uses)
    lines += [f"stage {row['stage']}: {agreement_line(row)}" for row in data["agreements"]]
    if retention := lost_skills(data["retention"]):
        lines.append(f"retention: {retention}")
    if len(data["pareto"]) > 1:
        lines.append(f"trade-offs: {len(data['pareto'])} candidates on the front, see {data['study']}/pareto")
    if data["partial"]:
        dropped = f"{data['dropped']} of them dropped by races"
        lines.append(f"{data['partial']} candidates were scored on a part of the items, {dropped}")
    return lines if len(lines) > 1 else []


def _best_or_damage(row: Mapping[str, Any]) -> str:
    """The best, or that the store is damaged, whose best may be anything."""
    if row.get("store", "ok") in ("ok", "not checked"):
        return f"best {_best(row)}"
    return f"its store is damaged, see: evomerge status {row['study']}"


def _best(row: Mapping[str, Any]) -> str:
    best = row["best"]
    if best is None:
        return "none yet"
    if row["alike"]:
        return f"none: all score {_number(best.get('search'))}"
    return f"{_number(best.get('test', best.get('search')))} (candidate {best['id']})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

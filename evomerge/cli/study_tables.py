"""Plain data of studies and candidates -> tables for the terminal: what `status`, `run` and `show` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.cli.output import column_width

NO_STUDIES = "no studies here; start one with: evomerge run CONFIG"


def line_of_study(row: Mapping[str, Any]) -> str:
    """One line for a study among others.

    Args:
        row: As `evomerge.reports.study_summary` gives it.

    Returns:
        The line.
    """
    return f"{row['study']}: {row['state']}, {row['evaluations']} evaluations, {_best_or_damage(row)}"


def study_table(data: Mapping[str, Any]) -> str:
    """A header line, and the table of the best candidate, the parents and the hand recipes.

    Args:
        data: As `evomerge.reports.study_summary` gives it.

    Returns:
        The text.
    """
    evaluations = f"{data['evaluations']} evaluations in {data['generations']} generations"
    lines = [
        f"{data['study']}: {data['state']}, seed {data['seed']}, {evaluations}, "
        f"{data['failed']} failed, store {data['store']}",
        *_metric_lines(data["metrics"]),
        "",
    ]
    rows = list(data["references"])
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
    return "\n".join([*lines, *_conclusions(data)])


def _metric_lines(metrics: Mapping[str, str]) -> list[str]:
    """What is scored of each task, where an answer is filtered: without that the metric's name says it."""
    filtered = [f"{task} by {name}" for task, name in metrics.items() if ", " in name]
    return [f"scored: {'; '.join(filtered)}"] if filtered else []


def candidate_text(data: Mapping[str, Any]) -> str:
    """One candidate: where it comes from, and its scores.

    Args:
        data: As `evomerge.reports.candidate` gives it.

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
    return "\n".join(lines)


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

"""Tables of studies and candidates, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def studies(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per study."""
    if not rows:
        return "no studies here; start one with: evomerge run CONFIG"
    return "\n".join(
        f"{r['study']}: {r['state']}, {r['evaluations']} evaluations, best {_best(r)}" for r in rows
    )


def study(data: Mapping[str, Any]) -> str:
    """Header line and the table of the best, parents and hand recipes."""
    lines = [
        f"{data['study']}: {data['state']}, seed {data['seed']}, {data['evaluations']} evaluations in {data['generations']} generations, "
        f"{data['failed']} failed, store {data['store']}",
        "",
        f"{'':34}{'search':>8}{'valid.':>8}{'test':>8}   lead of the best",
    ]
    rows = list(data["references"])
    if data["best"]:
        best = data["best"]
        rows.insert(0, best | {"label": f"best: {data['study']}/{best['id']} ({best['origin']})"})
    for row in rows:
        numbers = "".join(f"{_number(row.get(key)):>8}" for key in ("search", "validation", "test"))
        lead = f"   {row['lead']:+.3f} ± {row['lead_error']:.3f}" if "lead" in row else ""
        lines.append(
            f"{row['label'] or row['id']!s:34.34}{numbers}{lead}"
            + (f"   {row['error']}" if row.get("error") else "")
        )
    return "\n".join([*lines, *_said(data)])


def candidate(data: Mapping[str, Any]) -> str:
    """One candidate's story and scores."""
    name = f" '{data['label']}'" if data["label"] else ""
    lines = [
        f"candidate {data['id']}{name}: {data['origin']}, generation {data['generation']}, slot {data['slot']}, recipe {data['recipe']}"
    ]
    if data["partial"]:
        fate = (
            f"dropped by the race after rung {data['dropped']}"
            if data["dropped"]
            else "sure to be among the best of its generation before its end"
        )
        lines.append(f"{fate}, partial: {data['partial']}")
    if data["costs"]:
        lines.append(f"{data['costs']['layers']:.0f} layers, {data['costs']['parameters']:,.0f} parameters")
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
        if score.get("error"):
            lines.append(f"{score['role']}: failed: {score['error']}")
        else:
            metrics = ", ".join(
                f"{task} {value:.4f}" for task, value in score["metrics"].items() if ":" not in task
            )
            seconds = sum(score["seconds"].values())
            lines.append(
                f"{score['role']}: {_number(score['objective'])} on {score['items']} items ({metrics}) in {seconds:.2f} s"
            )
            soft = ", ".join(
                f"{name.replace(':', ' ')} {value:.4f}"
                for name, value in score["metrics"].items()
                if ":" in name
            )
            lines += [f"  right answers: {soft}"] if soft else []
    return "\n".join(lines)


def _said(data: Mapping[str, Any]) -> list[str]:
    """What follows the table: the winner's interval and luck, skills lost, the front, partial scores."""
    from evomerge.reports import lost_skills

    best, lines = data["best"] or {}, [""]
    if "test_interval" in best:
        low, high = best["test_interval"]
        luck = (
            f"; search - test {best['luck']:+.3f} ± {best['luck_error']:.3f} (luck of selection)"
            if "luck" in best
            else ""
        )
        lines.append(f"test score of the best, 95 % interval: {low:.3f} to {high:.3f}{luck}")
    if kept := lost_skills(data["retention"]):
        lines.append(f"retention: {kept}")
    if len(data["pareto"]) > 1:
        lines.append(f"trade-offs: {len(data['pareto'])} candidates on the front, see {data['study']}/pareto")
    if data["partial"]:
        lines.append(
            f"{data['partial']} candidates were scored on a part of the items, {data['dropped']} of them dropped by races"
        )
    return lines if len(lines) > 1 else []


def _best(row: Mapping[str, Any]) -> str:
    best = row["best"]
    return (
        "none yet"
        if best is None
        else f"{_number(best.get('test', best.get('search')))} (candidate {best['id']})"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

"""What plan, compare and sensitivity print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 100  # columns of a prompt
_LINES = 12  # of a prompt, its end is kept


def plan(data: Mapping[str, Any]) -> str:
    """Models, space, tasks, findings, work, and what a probe found."""
    space, optimizer, work = data["space"], data["optimizer"], data["work"]
    lines = [
        f"{data['study']}: {space['method']} over {len(data['models'])} models, {space['axes']} axes in {len(space['groups'])} layer groups",
        "",
    ]
    for m in data["models"]:
        base = " (base)" if m["base"] else ""
        size = f"{_short(m['parameters'])} parameters, {m['dtype']}, {_short(m['bytes'])}B"
        lines.append(
            f"  {m['name'] + base:24.24}{m['architecture']}, {m['layers']} layers, {size}, {m['path']}"
        )
    more = f", … {space['axes'] - len(space['first'])} more" if space["axes"] > len(space["first"]) else ""
    lines += ["", f"axes: {'; '.join(space['first'])}{more}", ""]
    lines.append(
        f"{'task':28}{'metric':18}{'weight':>7}{'search':>8}{'valid.':>8}{'test':>8}{'a generation':>14}   soft scores"
    )
    for t in data["tasks"]:
        sizes = "".join(f"{t['items'][role]:>8}" for role in ("search", "validation", "test"))
        arrow = "" if t["higher_is_better"] else " (lower is better)"
        soft = ", ".join(t["soft"]) or "none"
        lines.append(
            f"{t['task']:28.28}{t['metric']:18.18}{t['weight']:>7g}{sizes}{t['items_of_a_generation']:>14}   {soft}{arrow}"
        )
    lines += [f"warning: {w}" for w in data["warnings"]] + [f"note: {f}" for f in data["findings"]]
    start = f"start {optimizer['start']}, seed {optimizer['seed']}"
    covariance = f", {optimizer['covariance']} covariance" if optimizer["covariance"] else ""
    sizes = f"population {optimizer['population']}, sigma {optimizer['sigma']:g}"
    lines += ["", f"{optimizer['name']}: {sizes}{covariance}, {start}"]
    for number, stage in enumerate(data["stages"], 1):
        if len(data["stages"]) > 1 or stage["stage"] == "routes":
            what = f"{stage['axes']} genes, population {stage['population']}, {stage['evaluations']} evaluations, {stage['hand']} hand-written routes"
            lines.append(f"stage {number}, {stage['stage']}: {what}")
    for s in work["stages"]:
        lines.append(f"  {s['stage']}: {s['candidates']} candidates x {s['items']} items")
    raced = ", fewer with a race" if work["race"] else ""
    lines.append(
        f"  in all {work['generations']} generations, {work['item_evaluations']} scored items{raced}"
    )
    return "\n".join(
        lines
        + (
            _probe(data["probe"])
            if "probe" in data
            else ["", "not tried on the model; --probe does that and estimates the time"]
        )
    )


def _probe(probe: Mapping[str, Any]) -> list[str]:
    lines = ["", "what answers a task:"]
    lines += [f"  {task}: {how}" for task, how in probe["backends"].items()]
    lines.append("scoring techniques on this model:")
    lines += [
        f"  {name}: {'yes' if v['allowed'] else 'no'}, {v['reason']}"
        for name, v in probe["techniques"].items()
    ]
    each = f"{probe['seconds_merge']:.3f} s merging, {probe['seconds_score']:.3f} s scoring {probe['items']} items"
    lines.append(
        f"a candidate here: {each} (median of 3; the first, with what is done once, {probe['seconds_first']:.1f} s)"
    )
    lines.append(
        f"estimate of the whole search on this machine: {duration(probe['seconds_search'])}; other prompts and a busy machine make it another"
    )
    return lines


def comparison(data: Mapping[str, Any], role: str) -> str:
    """A column a candidate; under each score but the first's the paired difference to the first."""
    candidates = data["candidates"]
    lines = [
        f"{role}: {data['items']} items that all were scored on; differences are paired, to {candidates[0]['name']}"
    ]
    lines += [
        f"{c['name']}: candidate {c['id']} of {c['study']}" + (f", {c['label']}" if c["label"] else "")
        for c in candidates
    ]
    lines += [f"note: {note}" for note in data["notes"]]
    lines += [
        "",
        f"{'':24}{'items':>7}{candidates[0]['name'][:20]:>22}"
        + "".join(f"{c['name'][:32]:>34}" for c in candidates[1:]),
    ]
    for row in data["rows"]:
        first, *others = row["scores"]
        cells = [_cell(score, d) for score, d in zip(others, row["differences"], strict=True)]
        arrow = "" if row["higher_is_better"] else " ↓"
        lines.append(
            f"{row['task'] + arrow:24.24}{row['items']:>7}{_number(first):>22}"
            + "".join(f"{c:>34}" for c in cells)
        )
    lines += ["", "p: two-sided, of the difference, corrected by Holm for all of this table"]
    for sample in data.get("samples", ()):
        lines += ["", *_sample(sample)]
    return "\n".join(lines)


def _cell(score: float | None, difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return _number(score)
    error = "?" if difference["error"] is None else f"{difference['error']:.3f}"
    return f"{_number(score)} {difference['mean']:+.3f} ± {error} p {difference['p_holm']:.3f}"


def _sample(sample: Mapping[str, Any]) -> list[str]:
    """One item: prompt, right answer, and what each candidate said of it."""
    lines = [f"--- {sample['task']} {sample['item']}"]
    kept = [
        line[i : i + _WIDTH]
        for line in sample["prompt"].splitlines()
        for i in range(0, max(1, len(line)), _WIDTH)
    ]
    lines += (["  …"] if len(kept) > _LINES else []) + [f"  {line}" for line in kept[-_LINES:]]
    if sample["target"]:
        lines.append(f"  right: {sample['target'].strip()}")
    width = max(len(a["name"]) for a in sample["answers"])
    for a in sample["answers"]:
        said = " / ".join(line.strip() for line in a["output"].strip().splitlines()) or "(nothing)"
        options = "; ".join(
            f"{'>' if o['chosen'] else ''}{o['text'].strip()}{'*' if o['right'] else ''} {o['probability']:.3f}"
            for o in a["options"]
        )
        lines.append(f"  {a['name']:{width}} {a['value']:>7.3f}  {options or said}")
    return lines


def _option(o: Mapping[str, Any]) -> str:
    return (
        f"{'>' if o['chosen'] else ''}{o['text'].strip()}{'*' if o['right'] else ''} {o['probability']:.3f}"
    )


def sensitivity(data: Mapping[str, Any]) -> str:
    """A line an axis: spark line, the candidate's value, the best step, slope and verdict."""
    lines = [
        f"{data['study']}/{data['candidate']}: {data['score']:.4f} on {data['items']} {data['role']} items; {data['evaluated']} points scored now, "
        f"{data['stored']} were stored",
        *(f"note: {note}" for note in data["notes"]),
        "",
        f"{'axis':44}{'from':>8}{'to':>8}  {'curve':22}{'value':>8}{'best':>8}{'gain ± error':>18}{'slope ± error':>18}   verdict",
    ]
    scores = [s["score"] for c in data["axes"] for s in c["steps"] if s["score"] is not None]
    low, high = min(scores), max(scores)
    for c in data["axes"]:
        steps = c["steps"]
        curve = "".join(_bar(s["score"], low, high) for s in steps)
        best = next(s for s in steps if s["value"] == c["best"])
        gain = f"{best['difference']:+.4f} ± {best['error']:.4f}" if "difference" in best else "–"
        slope = f"{c['slope']:+.3f} ± {c['slope_error']:.3f}" if "slope" in c else "–"
        verdict = "steep" if c["steep"] else "flat"
        ends = f"{steps[0]['value']:>8.3g}{steps[-1]['value']:>8.3g}"
        lines.append(
            f"{c['axis']:44.44}{ends}  {curve:22}{c['value']:>8.3g}{c['best']:>8.3g}{gain:>18}{slope:>18}   {verdict}"
        )
    lines += [
        "",
        f"bars: {low:.4f} to {high:.4f}, × failed; steep: some step differs from the candidate, paired, p < 0.05 corrected for the steps of the axis",
    ]
    return "\n".join(lines)


def front(data: Mapping[str, Any]) -> str:
    """A line a candidate: its tasks, of which no other candidate has all."""
    lines = [
        f"{data['study']}, {data['items']}: {len(data['candidates'])} candidates that no other equals or betters in every task"
    ]
    for c in data["candidates"]:
        tasks = ", ".join(f"{task} {value:.4f}" for task, value in c["metrics"].items())
        lines.append(f"{c['id']:>6}  {_number(c['objective'])}  {tasks}  {c['label'] or c['origin']}")
    return "\n".join(lines)


def backends(found: Mapping[str, str]) -> list[str]:
    """What answered the tasks, in a line; none where the study does not say."""
    others = [f"{task}: {how}" for task, how in found.items() if how != "compiled"]
    compiled = [task for task, how in found.items() if how == "compiled"]
    lines = ([f"compiled requests: {', '.join(compiled)}"] if compiled else []) + others
    return [f"answered by {'; '.join(lines)}"] if lines else []


def _bar(score: float | None, low: float, high: float) -> str:
    if score is None:
        return "×"
    return _BARS[round((score - low) / (high - low) * (len(_BARS) - 1))] if high > low else _BARS[0]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{' ' if unit else ''}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def duration(seconds: float, decimals: int = 0) -> str:
    """'45 s', '12 min' or '3.5 h'. decimals: of seconds."""
    if seconds < 90:
        return f"{seconds:.{decimals}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

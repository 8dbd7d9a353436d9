"""Plain data -> text for the terminal: what plan, compare, sensitivity and show STUDY/pareto print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.cli.output import column_width, duration

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 100  # columns of a prompt
_LINES = 12  # lines of a prompt; the last ones are shown


def plan_text(data: Mapping[str, Any]) -> str:
    """Models, space, tasks, warnings and work of a planned search, and what a probe measured.

    Args:
        data: As `evomerge.launch.dry_run.plan_search` gives it.

    Returns:
        The text.
    """
    space, first = data["space"], data["stages"][0]
    size, axes = f"{space['axes']} axes in {len(space['groups'])} layer groups", space["ranges"]
    if space["choices"]:
        size += f", {len(space['choices'])} of them choose a method"
    if "items" in first:  # the first stage is learned, in a space of its own
        size, axes = f"{first['axes']} weights, {first['genome']}", []
    lines = [
        f"{data['study']}: {space['method']} over {len(data['models'])} models, {size}",
        "",
        *_model_lines(data["models"]),
        "",
        *(f"  {choice['name']}: {' or '.join(choice['methods'])}" for choice in space["choices"]),
        *(["axes, each from its start:"] if axes else []),
        *(
            f"  {axis['name']}: {axis['low']:g} to {axis['high']:g}, start {axis['start']:.4g}"
            for axis in axes
        ),
        *([""] if axes else []),
        *_task_lines(data["tasks"]),
        *(f"warning: {warning}" for warning in data["warnings"]),
        *(f"note: {note}" for note in data["findings"]),
        "",
        *_work_lines(data),
        *_memory_lines(data["memory"]),
        *_expense_lines(data),
    ]
    if "probe" in data:
        lines += _probe_lines(data["probe"])
    else:
        lines += ["", "not tried on the model; --probe does that and estimates the time"]
    return "\n".join(lines)


def _model_lines(models: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [model["name"] + (" (base)" if model["base"] else "") for model in models]
    width = column_width(names, 24)
    return [_model_line(f"{name:{width}}", model) for name, model in zip(names, models, strict=True)]


def _model_line(name: str, model: Mapping[str, Any]) -> str:
    parameters = f"{_short(model['parameters'])} parameters"
    size = f"{parameters}, {model['dtype']}, {_short(model['bytes'])}B"
    license = ", ".join(model.get("licenses", ()))
    said = f", license {license}" if license else ""
    return f"  {name}{model['architecture']}, {model['layers']} layers, {size}{said}, {model['path']}"


def _task_lines(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    counts = f"{'search':>8}{'valid.':>8}{'test':>8}{'a generation':>14}"
    metrics = [t["metric"] if t["filter"] is None else f"{t['metric']}, {t['filter']}" for t in tasks]
    wide = column_width([t["task"] for t in tasks], 28)
    medium = column_width(metrics, 18)
    lines = [f"{'task':{wide}}{'metric':{medium}}{'weight':>7}{counts}   soft scores"]
    for t, metric in zip(tasks, metrics, strict=True):
        sizes = "".join(f"{t['items'][role]:>8}" for role in ("search", "validation", "test"))
        counts = f"{t['weight']:>7g}{sizes}{t['items_of_a_generation']:>14}"
        soft = ", ".join(t["soft"]) or "none"
        arrow = "" if t["higher_is_better"] else " (lower is better)"
        lines.append(f"{t['task']:{wide}}{metric:{medium}}{counts}   {soft}{arrow}")
    return lines


def _work_lines(data: Mapping[str, Any]) -> list[str]:
    """The optimizer, and each step of the search with its candidates and items."""
    optimizer, work = data["optimizer"], data["work"]
    settings = ""
    if optimizer["sigma"] is not None:
        settings = f"population {optimizer['population']}, sigma {optimizer['sigma']:g}"
    start = f"start {optimizer['start']}, seed {optimizer['seed']}"
    covariance = f"{optimizer['covariance']} covariance" if optimizer["covariance"] else ""
    lines = [f"{optimizer['name']}: {', '.join(part for part in (settings, covariance, start) if part)}"]
    for number, stage in enumerate(data["stages"], 1):
        if "items" in stage:
            text = (
                f"{stage['axes']} genes, {stage['evaluations']} steps of {stage['items']} items of each task"
            )
            lines.append(f"stage {number}, {stage['stage']}: {text}")
        elif len(data["stages"]) > 1 or stage["stage"] == "routes":
            search = f"population {stage['population']}, {stage['evaluations']} evaluations"
            text = f"{stage['axes']} genes, {search}, {stage['hand']} hand-written routes"
            lines.append(f"stage {number}, {stage['stage']}: {text}")
    for step in work["stages"]:
        lines.append(f"  {step['stage']}: {step['candidates']} candidates x {step['items']} items")
    raced = ", fewer with a race" if work["race"] else ""
    total = f"{work['generations']} generations, {work['item_evaluations']} scored items{raced}"
    return [*lines, f"  in all {total}", *_recommended(data)]


def _memory_lines(memory: Mapping[str, Any]) -> list[str]:
    """What lies where; one line on a CPU."""
    if memory["cards"] is None:
        return [f"memory: {line}" for line in memory["lines"]]
    if not memory["fits"]:
        return [f"memory of {memory['cards']}: {line}" for line in memory["lines"]]
    first, *others = memory["lines"]
    return [f"memory of {memory['cards']}: {first}", *(f"  {line}" for line in others)]


def _expense_lines(data: Mapping[str, Any]) -> list[str]:
    """Where the search runs, what it takes on disk, in hours and in money."""
    disk = data["disk"]
    free = "" if disk["free"] is None else f", {_short(disk['free'])}B free"
    return [
        f"cluster: {data['cluster']['line']}",
        f"disk: {disk['root']}{free}; about {_short(disk['study'])}B with backups, an export with weights "
        f"{_short(disk['export'])}B",
        *([f"warning: {disk['warning']}"] if disk["warning"] else []),
        *(f"cost: {line}" for line in data["cost"]["lines"]),
    ]


def _recommended(data: Mapping[str, Any]) -> list[str]:
    """The first stage that is recommended for the same budget, and why."""
    if "recommended" not in data:
        return []
    found = data["recommended"]
    stage = ", ".join(f"{key}: {value}" for key, value in found["stage"].items())
    lines = [f"recommended first stage: {{{stage}}}, {found['item_forwards']} item forwards"]
    return [*lines, *(f"  {reason}" for reason in found["reasons"])]


def _probe_lines(probe: Mapping[str, Any]) -> list[str]:
    lines = ["", "what answers a task:"]
    lines += [f"  {task}: {backend}" for task, backend in probe["backends"].items()]
    lines.append("what the parents score:")
    for name, metrics in probe["parents"].items():
        values = ", ".join(f"{task} {value:.4g}" for task, value in metrics.items() if ":" not in task)
        lines.append(f"  {name}: {values}")
    lines.append("scoring techniques on this model:")
    for name, verdict in probe["techniques"].items():
        lines.append(f"  {name}: {'yes' if verdict['allowed'] else 'no'}, {verdict['reason']}")
    scoring = f"{probe['seconds_score']:.3f} s scoring {probe['items']} items"
    first = f"the first, with what is done once, {probe['seconds_first']:.1f} s"
    lines.append(
        f"a candidate here: {probe['seconds_merge']:.3f} s merging, {scoring} (median of 3; {first})"
    )
    total = duration(probe["seconds_search"])
    caveat = "other prompts and a busy machine make it another"
    return [*lines, f"estimate of the whole search on this machine: {total}; {caveat}"]


def comparison_table(data: Mapping[str, Any], role: str) -> str:
    """A column for each candidate; in each but the first the paired difference to the first.

    Args:
        data: As `evomerge.launch.rescoring.compare` gives it.
        role: Of the items: search, validation or test.

    Returns:
        The text, with samples at the end where there are any.
    """
    candidates = data["candidates"]
    first = candidates[0]["name"]
    lines = [f"{role}: {data['items']} items that all were scored on; differences are paired, to {first}"]
    for c in candidates:
        label = f", {c['label']}" if c["label"] else ""
        lines.append(f"{c['name']}: candidate {c['id']} of {c['study']}{label}")
    lines += [f"note: {note}" for note in data["notes"]]
    columns = "".join(f"{c['name'][:32]:>34}" for c in candidates[1:])
    names = [row["task"] + ("" if row["higher_is_better"] else " ↓") for row in data["rows"]]
    width = column_width(names, 24)
    lines += ["", f"{'':{width}}{'items':>7}{first[:20]:>22}{columns}"]
    for name, row in zip(names, data["rows"], strict=True):
        score, *others = row["scores"]
        cells = [_cell(other, d) for other, d in zip(others, row["differences"], strict=True)]
        columns = "".join(f"{cell:>34}" for cell in cells)
        lines.append(f"{name:{width}}{row['items']:>7}{_number(score):>22}{columns}")
    lines += ["", "p: two-sided, of the difference, corrected by Holm for all of this table"]
    for sample in data.get("samples", ()):
        lines += ["", *_sample_lines(sample)]
    return "\n".join(lines)


def _cell(score: float | None, difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return _number(score)
    error = "?" if difference["error"] is None else f"{difference['error']:.3f}"
    return f"{_number(score)} {difference['mean']:+.3f} ± {error} p {difference['p_holm']:.3f}"


def _sample_lines(sample: Mapping[str, Any]) -> list[str]:
    """One item: prompt, right answer, and each candidate's output."""
    lines = [f"--- {sample['task']} {sample['item']}"]
    prompt = _wrapped(sample["prompt"])
    if len(prompt) > _LINES:
        lines.append("  …")
    lines += [f"  {line}" for line in prompt[-_LINES:]]
    if sample["target"]:
        lines.append(f"  right: {sample['target'].strip()}")
    width = max(len(a["name"]) for a in sample["answers"])
    for a in sample["answers"]:
        output = " / ".join(line.strip() for line in a["output"].strip().splitlines()) or "(nothing)"
        options = "; ".join(_option(option) for option in a["options"])
        lines.append(f"  {a['name']:{width}} {a['value']:>7.3f}  {options or output}")
    return lines


def _wrapped(text: str) -> list[str]:
    """Lines of at most `_WIDTH` columns."""
    return [line[i : i + _WIDTH] for line in text.splitlines() for i in range(0, max(1, len(line)), _WIDTH)]


def _option(option: Mapping[str, Any]) -> str:
    """One answer of a multiple choice: '>' marks the chosen one, '*' the right one."""
    chosen, right = ">" if option["chosen"] else "", "*" if option["right"] else ""
    return f"{chosen}{option['text'].strip()}{right} {option['probability']:.3f}"


def sensitivity_table(data: Mapping[str, Any]) -> str:
    """A line for each axis: spark line, the candidate's value, the best step, slope and verdict.

    Args:
        data: As `evomerge.launch.rescoring.sensitivity` gives it.

    Returns:
        The text.
    """
    score = f"{data['score']:.4f} on {data['items']} {data['role']} items"
    points = f"{data['evaluated']} points scored now, {data['stored']} were stored"
    numbers = f"{'value':>8}{'best':>8}{'gain ± error':>18}{'slope ± error':>18}"
    lines = [
        f"{data['study']}/{data['candidate']}: {score}; {points}",
        *(f"note: {note}" for note in data["notes"]),
        "",
        f"{'axis':44}{'from':>8}{'to':>8}  {'curve':22}{numbers}   verdict",
    ]
    scores = [s["score"] for c in data["axes"] for s in c["steps"] if s["score"] is not None]
    low, high = min(scores), max(scores)
    lines += [_curve_line(curve, low, high) for curve in data["axes"]]
    steep = "some step differs from the candidate, paired, p < 0.05 corrected for the steps of the axis"
    return "\n".join([*lines, "", f"bars: {low:.4f} to {high:.4f}, × failed; steep: {steep}"])


def derivatives_table(data: Mapping[str, Any]) -> str:
    """A line for each axis: its value, the derivative by it, and the slope of its scan where that is stored.

    Args:
        data: As `evomerge.launch.derivatives.differentiate` gives it.

    Returns:
        The text.
    """
    loss = f"loss {data['loss']:.4f} on {data['items']} {data['role']} items"
    lines = [
        f"{data['study']}/{data['candidate']}: {loss}; errors from {data['shards']} parts of them",
        *(f"note: {note}" for note in data["notes"]),
        "",
        f"{'axis':60}{'value':>8}{'derivative ± error':>22}{'slope of the scan':>20}",
    ]
    for axis in data["axes"]:
        own, scanned = "–", "–"
        if "derivative" in axis:
            own = f"{axis['derivative']:+.4f} ± {axis['derivative_error']:.4f}"
        if "slope" in axis:
            scanned = f"{axis['slope']:+.3f} ± {axis['slope_error']:.3f}"
        lines.append(f"{axis['axis']:60.60}{axis['value']:>8.3g}{own:>22}{scanned:>20}")
    unit = "of right answers' mean probability (for plain texts, of a token's log-probability)"
    law = "by one unit of the coefficient; – where none is known"
    return "\n".join([*lines, "", f"derivative: {unit} {law}"])


def _curve_line(curve: Mapping[str, Any], low: float, high: float) -> str:
    steps = curve["steps"]
    bars = "".join(_bar(step["score"], low, high) for step in steps)
    best = next(step for step in steps if step["value"] == curve["best"])
    gain = f"{best['difference']:+.4f} ± {best['error']:.4f}" if "difference" in best else "–"
    slope = f"{curve['slope']:+.3f} ± {curve['slope_error']:.3f}" if "slope" in curve else "–"
    ends = f"{steps[0]['value']:>8.3g}{steps[-1]['value']:>8.3g}"
    numbers = f"{curve['value']:>8.3g}{curve['best']:>8.3g}{gain:>18}{slope:>18}"
    return f"{curve['axis']:44.44}{ends}  {bars:22}{numbers}   {'steep' if curve['steep'] else 'flat'}"


def front_table(data: Mapping[str, Any]) -> str:
    """A line for each candidate of the Pareto front, with its tasks' scores.

    Args:
        data: As `evomerge.reports.front` gives it.

    Returns:
        The text.
    """
    candidates = data["candidates"]
    law = "candidates that no other equals or betters in every task"
    lines = [f"{data['study']}, {data['items']}: {len(candidates)} {law}"]
    for c in candidates:
        tasks = ", ".join(f"{task} {value:.4f}" for task, value in c["metrics"].items())
        lines.append(f"{c['id']:>6}  {_number(c['objective'])}  {tasks}  {c['label'] or c['origin']}")
    return "\n".join(lines)


def backend_lines(backends: Mapping[str, str]) -> list[str]:
    """What answered the tasks of a study, in one line.

    Args:
        backends: Task -> 'compiled', or why lm-eval's own path answered it.

    Returns:
        One line; none where the study does not say.
    """
    others = [f"{task}: {backend}" for task, backend in backends.items() if backend != "compiled"]
    compiled = [task for task, backend in backends.items() if backend == "compiled"]
    parts = ([f"compiled requests: {', '.join(compiled)}"] if compiled else []) + others
    return [f"answered by {'; '.join(parts)}"] if parts else []


def _bar(score: float | None, low: float, high: float) -> str:
    if score is None:
        return "×"
    if high <= low:
        return _BARS[0]
    return _BARS[round((score - low) / (high - low) * (len(_BARS) - 1))]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _short(number: float) -> str:
    """1234567 as '1.23 M'."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{' ' if unit else ''}{unit}"
        number /= 1000
    return f"{number:.3g} T"

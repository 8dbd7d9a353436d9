"""What a study stores about itself: the facts that its scores depend on, and the outcome of its search.

Both are stored as JSON in the study's own row. Keys and attributes have the same name, except where a
docstring says otherwise. A key that this version does not know is kept in `extra`, and a key that an older
version did not write reads as the default of its attribute, which is empty or zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

_SHOWN = 40  # characters of a value that a difference shows


@dataclass(frozen=True, slots=True)
class ParentFacts:
    """Which model a parent is.

    Attributes:
        path: The model's folder, or its repository on the hub.
        revision: Revision of the repository, None for its default or for a folder.
        sha256: Content hash of the model's files, see `evomerge.checkpoints.Parent.content_hash`.
    """

    path: str
    revision: str | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class TermFacts:
    """What a task's metric is: enough to build an objective without loading the task.

    Attributes:
        sign: 1 where a higher metric is better, -1 where a lower one is.
        mean: Whether the metric is a mean over items.
        soft_metrics: Soft metrics that the task has, such as 'probability'; stored as `measures`.
        subtasks: (name, share of the metric) of the tasks that the items belong to, the task itself where it
            is no group; stored as `leaves`.
    """

    sign: int
    mean: bool
    soft_metrics: tuple[str, ...]
    subtasks: tuple[tuple[str, float], ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TermFacts:
        """Reads a term as stored.

        Args:
            data: Mapping with the keys `sign`, `mean`, `measures` and `leaves`.

        Returns:
            The term.

        Raises:
            KeyError: A key is missing.
        """
        subtasks = tuple((name, share) for name, share in data["leaves"])
        return cls(data["sign"], data["mean"], tuple(data["measures"]), subtasks)

    def to_json(self) -> dict[str, Any]:
        """The term as stored."""
        return {
            "sign": self.sign,
            "mean": self.mean,
            "measures": list(self.soft_metrics),
            "leaves": [[name, share] for name, share in self.subtasks],
        }


@dataclass(frozen=True, slots=True)
class StudyFacts:
    """Everything beside the settings that must be the same when a study is resumed, or its scores are reused.

    Attributes:
        parents: Model name -> which model it is.
        tasks: Task -> hash of its settings, code, prompts and of which items have which role.
        sources: Python task -> file or package -> hash or version of the code that it depends on; empty for a
            study of a version that did not store it.
        metrics: Task -> name of its metric.
        filters: Task, where one filters a generated text -> name of its filter; the task's hash holds it.
        terms: Task -> what its metric is; empty for a study of a version that did not store it.
        backends: Task -> what scores it: 'compiled', or 'lm-eval: ' and the reason.
        items: Role -> task -> number of items.
        item_sets: Role -> task -> hash of the items' ids.
        axes: Names of the first stage's search dimensions, where it searches weights.
        searched: Parameters of the method that are searched though the search file does not name them, beside
            those that every recipe must give; empty for a study of a version that searched no others.
        diagonal: Whether weight searches adapt a diagonal covariance matrix.
        budgets: Evaluations of each stage; empty for a study of a version that did not store them.
        scoring: How scores are computed: base, dtype, device, backend, batch_size, tokenizer, and on a GPU
            its card, capability and budgets; empty where not stored.
        max_nats_per_token: Limit of the perplexity screen for routes, None without a screen; stored as
            `gate`.
        num_workers: Number of workers that 'auto' settings were chosen for; 0.5.0 stored it as `crew`.
        base_layers: Number of layers of the base model, which cost no size penalty; stored as `depth`.
        threads: Number of CPU threads of a merge and of a score; 0 where not stored.
        files: Key of the search file -> absolute paths that it names; empty where not stored. A place, which
            may change, like the paths of the parents.
        objective: What the search maximizes, see `evomerge.store.score_check`; empty where not stored.
        versions: Package -> version.
        verifications: Which optimizations of scoring were found to give a model's own numbers when the study
            began, see `evomerge.evaluation.inference.verification_cache`; it goes on with these. Empty where
            not stored.
        limits: What the last run may use up, see `evomerge.reports.tally.Limits`; empty where not stored.
        extra: Keys that this version does not know, as stored.
    """

    parents: Mapping[str, ParentFacts] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    filters: Mapping[str, str] = field(default_factory=dict)
    terms: Mapping[str, TermFacts] = field(default_factory=dict)
    backends: Mapping[str, str] = field(default_factory=dict)
    items: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    item_sets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    axes: tuple[str, ...] = ()
    searched: tuple[str, ...] = ()
    diagonal: bool = False
    budgets: tuple[int, ...] = ()
    scoring: Mapping[str, Any] = field(default_factory=dict)
    max_nats_per_token: float | None = None
    num_workers: int = 1
    base_layers: int = 0
    threads: int = 0
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    verifications: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StudyFacts:
        """Reads facts as stored, also those of older versions.

        Args:
            data: Stored key -> value, as `to_json` gives it.

        Returns:
            The facts.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: A value has another form than `to_json` writes.
        """
        values = {_FACT_OF_KEY.get(key, key): value for key, value in data.items()}
        names = {attribute.name for attribute in fields(cls)} - {"extra"}
        facts = {name: value for name, value in values.items() if name in names}
        facts["parents"] = {
            name: ParentFacts(parent["path"], parent.get("revision"), parent.get("sha256", ""))
            for name, parent in facts.get("parents", {}).items()
        }
        facts["terms"] = {name: TermFacts.from_json(term) for name, term in facts.get("terms", {}).items()}
        facts["axes"] = tuple(facts.get("axes", ()))
        facts["searched"] = tuple(facts.get("searched", ()))
        facts["budgets"] = tuple(facts.get("budgets", ()))
        return cls(**facts, extra={name: value for name, value in values.items() if name not in names})

    def to_json(self) -> dict[str, Any]:
        """The facts as stored: key -> plain value."""
        return {
            "parents": {
                name: {"path": parent.path, "revision": parent.revision, "sha256": parent.sha256}
                for name, parent in self.parents.items()
            },
            "tasks": dict(self.tasks),
            "metrics": dict(self.metrics),
            "terms": {name: term.to_json() for name, term in self.terms.items()},
            "backends": dict(self.backends),
            "items": {role: dict(counts) for role, counts in self.items.items()},
            "item_sets": {role: dict(hashes) for role, hashes in self.item_sets.items()},
            "axes": list(self.axes),
            "diagonal": self.diagonal,
            "budgets": list(self.budgets),
            "scoring": dict(self.scoring),
            "gate": self.max_nats_per_token,
            "num_workers": self.num_workers,
            "depth": self.base_layers,
            "threads": self.threads,
            "versions": dict(self.versions),
            **({"files": {key: list(paths) for key, paths in self.files.items()}} if self.files else {}),
            **({"objective": dict(self.objective)} if self.objective else {}),
            **({"filters": dict(self.filters)} if self.filters else {}),
            **({"verifications": dict(self.verifications)} if self.verifications else {}),
            **({"limits": dict(self.limits)} if self.limits else {}),
            **({"searched": list(self.searched)} if self.searched else {}),
            **({"sources": {task: dict(of) for task, of in self.sources.items()}} if self.sources else {}),
            **self.extra,
        }

    def differences(self, other: StudyFacts) -> list[str]:
        """Compares these facts, as those of a stored study, with those of now; places may differ.

        A parent is compared by the hash of its content, where there is one. A study that was begun before
        cards were stored goes on with any.

        Args:
            other: The facts of now.

        Returns:
            'key was X, is Y' for every value that differs, empty where all agree.
        """
        before, now = self.to_json(), other.to_json()
        before["versions"] = comparable_versions(self.versions)
        now["versions"] = comparable_versions(other.versions)
        if before["scoring"].get("device") == now["scoring"].get("device"):
            for key in [key for key in CARD_FACTS if key not in before["scoring"]]:
                now["scoring"].pop(key, None)
        for facts in (before, now):
            for key in ("files", "objective", "verifications", "filters", "limits"):
                facts.pop(key, None)
            for parent in facts["parents"].values():
                if parent["sha256"]:
                    del parent["path"], parent["revision"]
        return differences(before, now)


CARD_FACTS = ("card", "capability", "budgets")
"""Keys of `StudyFacts.scoring` that say what a GPU computes scores with; on a CPU there are none."""
_SAME_ROWS = ("0.5.0", "0.6.0")
"""Versions of evomerge that store the same rows for the same search: a study of one goes on with another."""


def comparable_versions(versions: Mapping[str, str]) -> dict[str, str]:
    """Versions with one name for those of evomerge that store the same rows for the same search.

    Args:
        versions: Package -> version.

    Returns:
        A copy for comparisons; versions of evomerge that store the same rows read as the newest of them.
    """
    comparable = dict(versions)
    if comparable.get("evomerge") in _SAME_ROWS:
        comparable["evomerge"] = _SAME_ROWS[-1]
    return comparable


_FACT_OF_KEY = {"gate": "max_nats_per_token", "depth": "base_layers", "crew": "num_workers"}


FOLLOWS = 0.5
"""Rank correlation below which a surrogate does not follow the metric."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether what a learned stage climbs ranks candidates as the metrics do.

    Attributes:
        correlation: Spearman's rank correlation of the surrogates' and the metrics' means over tasks; None
            where all candidates are alike.
        tasks: Task -> the same of it alone.
        candidates: That were compared: parents, hand recipes and the stage's finalists.
        items: Validation items that they were compared on.
        forwards: Items that were scored for it alone.
    """

    correlation: float | None
    tasks: Mapping[str, float | None]
    candidates: int
    items: int
    forwards: int

    @property
    def sentence(self) -> str:
        """What a user should do, '' where the surrogate follows the metric or nothing is known."""
        if self.correlation is None or self.correlation >= FOLLOWS:
            return ""
        return "the surrogate does not follow the metric here: add a stage of weights"

    def to_json(self) -> dict[str, Any]:
        """The agreement as stored."""
        return {
            "correlation": self.correlation,
            "tasks": dict(self.tasks),
            "candidates": self.candidates,
            "items": self.items,
            "forwards": self.forwards,
        }


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """How a stage of a search ended.

    Attributes:
        stage: 'weights' or 'routes'.
        first: Number of its first generation.
        last: Number of its last generation.
        best: Id of its finalist that is best on validation, None where none could be scored.
        agreement: Of a learned stage, whether its surrogate follows the metrics; None where not measured.
    """

    stage: str
    first: int
    last: int
    best: int | None
    agreement: Agreement | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageOutcome:
        """Reads a stage as stored.

        Args:
            data: Stored key -> value, as `to_json` gives it.

        Returns:
            The stage.

        Raises:
            KeyError, TypeError: A value has another form than `to_json` writes.
        """
        agreement = data.get("agreement")
        if agreement is not None:
            agreement = Agreement(**agreement)
            _check_numbers({"correlation": agreement.correlation}, ("correlation",))
            _check_numbers(agreement.tasks, tuple(agreement.tasks))
        return cls(data["stage"], data["first"], data["last"], data["best"], agreement)

    def to_json(self) -> dict[str, Any]:
        """The stage as stored."""
        data = {"stage": self.stage, "first": self.first, "last": self.last, "best": self.best}
        return data if self.agreement is None else data | {"agreement": self.agreement.to_json()}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished search found.

    Attributes:
        best: The winner's row: id, origin, label, recipe and its scores by role, see
            `evomerge.search.selection.row`.
        references: Rows of parents and hand recipes, with the winner's lead over each on the test items.
        finalists: Rows of the candidates that were scored on the validation items.
        retention: By task and parent how much of the parent's skill the winner has lost.
        estimates: Candidate id -> (mean, standard error) of its objective over all search items.
        generations: Number of the last generation.
        stages: How each stage ended.
        extra: Keys that this version does not know, as stored.
    """

    best: Mapping[str, Any]
    references: tuple[Mapping[str, Any], ...] = ()
    finalists: tuple[Mapping[str, Any], ...] = ()
    retention: tuple[Mapping[str, Any], ...] = ()
    estimates: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    generations: int = 0
    stages: tuple[StageOutcome, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """Reads an outcome as stored, also one of an older version.

        Args:
            data: Stored key -> value, as `to_json` gives it.

        Returns:
            The outcome.

        Raises:
            KeyError, TypeError, ValueError: A value has another form than `to_json` writes.
        """
        names = {attribute.name for attribute in fields(cls)} - {"extra"}
        stages = [StageOutcome.from_json(row) for row in data.get("stages", ())]
        int(data["best"]["id"])
        for row in (data["best"], *data.get("references", ()), *data.get("finalists", ())):
            _check_line(row)
        for row in data.get("retention", ()):
            _check_numbers(row, ("difference", "error"))
        estimates = {
            int(trial_id): (mean, error) for trial_id, (mean, error) in data.get("estimates", {}).items()
        }
        return cls(
            best=data["best"],
            references=tuple(data.get("references", ())),
            finalists=tuple(data.get("finalists", ())),
            retention=tuple(data.get("retention", ())),
            estimates=estimates,
            generations=data.get("generations", 0),
            stages=tuple(stages),
            extra={key: value for key, value in data.items() if key not in names},
        )

    def to_json(self) -> dict[str, Any]:
        """The outcome as stored: key -> plain value."""
        return {
            "best": dict(self.best),
            "references": [dict(row) for row in self.references],
            "finalists": [dict(row) for row in self.finalists],
            "retention": [dict(row) for row in self.retention],
            "estimates": {str(trial_id): [mean, error] for trial_id, (mean, error) in self.estimates.items()},
            "generations": self.generations,
            "stages": [stage.to_json() for stage in self.stages],
            **self.extra,
        }


_SCORES = ("search", "validation", "test", "lead", "lead_error", "luck", "luck_error", "estimate", "p")


def _check_line(row: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError for what cannot be a candidate's line of an outcome."""
    if not isinstance(row.get("recipe"), str | None) or not str(row.get("label")).isprintable():
        raise ValueError("a line of the outcome has no recipe, or a label with control characters")
    if "id" in row:
        int(row["id"])
    _check_numbers(row, _SCORES)
    for key in ("test_interval", "lead_interval"):
        if row.get(key) is not None:
            low, high = row[key]
            _check_numbers({"low": low, "high": high}, ("low", "high"))


def _check_numbers(row: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if not isinstance(row.get(key), int | float | None):
            raise TypeError(f"{key} of the outcome is no number")


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Compares plain data leaf by leaf.

    Args:
        before: What was stored; mappings are compared key by key, anything else as a whole.
        now: What it is now.
        path: Where in the data this is, for the sentences.

    Returns:
        'path was X, is Y' for every leaf that differs, in the order of the keys.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        lines: list[str] = []
        for key in sorted(set(before) | set(now)):
            lines += differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        return lines
    if before == now:
        return []
    return [f"{path} was {_shortened(before)}, is {_shortened(now)}"]


def _shortened(value: Any) -> str:
    text = str(value)
    return f"{text[:_SHOWN]}…" if len(text) > _SHOWN else text

"""The models of a new search side by side: kinds, sizes, licenses, the base, how far apart they lie.

Distances are of a sample of the layers' matrices: some million elements of each model are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from evomerge.checkpoints import Parent, check_compatible, open_parent, stored_dtype, total_bytes
from evomerge.checkpoints.licenses import cards_of
from evomerge.checkpoints.reference import split_reference
from evomerge.errors import CheckpointError, ConfigError, suggest

_TENSORS = 24  # sampled matrices, evenly over the depth
_ELEMENTS = 1 << 18  # of each
FAR = 0.7
"""Distance, as a share of the base's length, above which models do not come from one base: weights that were
trained apart are 1.4 apart."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What headers, config and card say of a model.

    Attributes:
        name: In the search file.
        reference: Folder or repository.
        architecture: Name of its class.
        layers: Depth of its decoder.
        parameters: Number of its parameters.
        dtype: torch's name of the type of most of its tensors.
        size: Bytes of its tensors.
        rows: Rows of its embeddings, 0 where it has no such table.
        license: Of its card, and of its adapter's; None where one is unknown.
        base_models: What its card names as its base.
        has_chat_template: Whether its tokenizer brings a chat template.
    """

    name: str
    reference: str
    architecture: str
    layers: int
    parameters: int
    dtype: str
    size: int
    rows: int
    license: str | None
    base_models: tuple[str, ...]
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class Survey:
    """The models of a new search, compared.

    Attributes:
        models: Name -> facts, in the order given.
        base: Name of the base.
        base_reason: Why this one, in a few words.
        distances: Model but the base -> ‖model - base‖ / ‖base‖ over the sample.
        overlap: Mean cosine between the task vectors of two models; None for fewer than two.
        warnings: What speaks against merging the models, sentences.
        parents: The open models.
    """

    models: Mapping[str, ModelFacts]
    base: str
    base_reason: str
    distances: Mapping[str, float]
    overlap: float | None
    warnings: tuple[str, ...]
    parents: Mapping[str, Parent]

    @property
    def has_shared_base(self) -> bool:
        """Whether all models lie as near to the base as fine-tunes of it do."""
        return all(distance < FAR for distance in self.distances.values())


def survey_models(references: Mapping[str, str], base: str | None = None) -> Survey:
    """Opens models and compares them; reads headers, configs, cards and a sample of the weights.

    Args:
        references: Name -> folder, GGUF file or repository, which is downloaded unless it is in the cache.
        base: Name of the base; None to find it.

    Returns:
        The survey.

    Raises:
        CheckpointError: A model cannot be opened, or does not fit the base.
        ConfigError: There are fewer than two models, or the base is not among them.
    """
    if len(references) < 2:
        raise ConfigError(f"a merge takes two models or more, got {len(references)}; give --model for each")
    if base is not None and base not in references:
        raise ConfigError(f"base '{base}' is not among the models. {suggest(base, references)}")
    parents = {name: _open(name, reference) for name, reference in references.items()}
    facts = {name: _facts(name, references[name], parent) for name, parent in parents.items()}
    names = list(parents)
    gram = _gram(list(parents.values()))
    if base is None:
        base, reason = _find_base(facts, names, gram)
    else:
        reason = "as given"
    warnings = check_compatible(parents, base)
    others = [name for name in names if name != base]
    at = names.index(base)
    distances = {name: _distance(gram, names.index(name), at) for name in others}
    overlap = _overlap(gram, [names.index(name) for name in others], at)
    return Survey(facts, base, reason, distances, overlap, warnings, parents)


def _open(name: str, reference: str) -> Parent:
    try:
        return open_parent(reference)
    except CheckpointError as error:
        raise CheckpointError(
            f"model '{name}': {error}; to write the file before the models are here, add --unread"
        ) from None


def _facts(name: str, reference: str, parent: Parent) -> ModelFacts:
    kinds = parent.config.get("architectures")
    cards = cards_of(parent)
    licenses = [card.license.shown for card in cards if card.license is not None]
    tables = [parent.tensors[tensor].shape for tensor in parent.layout.outer_names("embeddings")]
    return ModelFacts(
        name=name,
        reference=reference,
        architecture=str(kinds[0]) if isinstance(kinds, list) and kinds else "unknown architecture",
        layers=parent.layout.num_layers,
        parameters=sum(math.prod(info.shape) for info in parent.tensors.values()),
        dtype=stored_dtype(parent),
        size=total_bytes(parent),
        rows=max((shape[0] for shape in tables if len(shape) == 2), default=0),
        license=" and ".join(licenses) if len(licenses) == len(cards) else None,
        base_models=tuple(name for card in cards for name in card.base_models),
        has_chat_template=_has_chat_template(parent),
    )


def _has_chat_template(parent: Parent) -> bool:
    if (parent.path / "chat_template.jinja").is_file():
        return True
    file = parent.path / "tokenizer_config.json"
    return file.is_file() and '"chat_template"' in file.read_text(encoding="utf-8", errors="replace")


def _sampled_names(parents: Sequence[Parent]) -> list[str]:
    """Matrices of the layers that all models have in one shape, evenly over the depth."""
    first = parents[0]
    shared = [
        name
        for name, info in first.tensors.items()
        if len(info.shape) == 2
        and first.layout.place(name).layer is not None
        and all(name in p.tensors and p.tensors[name].shape == info.shape for p in parents)
    ]
    shared.sort(key=lambda name: (first.layout.place(name).layer, name))
    step = max(1, math.ceil(len(shared) / _TENSORS))
    return shared[::step]


def _gram(parents: Sequence[Parent]) -> torch.Tensor:
    """[models, models] float64 dot products of the sampled weights."""
    gram = torch.zeros(len(parents), len(parents), dtype=torch.float64)
    for name in _sampled_names(parents):
        rows = torch.stack([_sample(parent.tensor(name)) for parent in parents]).double()
        gram += rows @ rows.T
    return gram


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Every k-th row of a matrix, `_ELEMENTS` numbers at most or one row."""
    step = max(1, math.ceil(tensor.numel() / _ELEMENTS))
    return tensor[::step].float().flatten()


def _distance(gram: torch.Tensor, one: int, base: int) -> float:
    square = float(gram[one, one] + gram[base, base] - 2 * gram[one, base])
    length = float(gram[base, base])
    return math.sqrt(max(square, 0.0) / length) if length > 0 else 0.0


def _overlap(gram: torch.Tensor, models: Sequence[int], base: int) -> float | None:
    """Mean cosine between two models' differences to the base; models that equal it are left out."""
    products = {
        (i, j): float(gram[i, j] - gram[i, base] - gram[j, base] + gram[base, base])
        for i in models
        for j in models
    }
    cosines = [
        products[i, j] / math.sqrt(products[i, i] * products[j, j])
        for i in models
        for j in models
        if i < j and products[i, i] > 0 and products[j, j] > 0
    ]
    return sum(cosines) / len(cosines) if cosines else None


def _find_base(facts: Mapping[str, ModelFacts], names: Sequence[str], gram: torch.Tensor) -> tuple[str, str]:
    """(name of the base, why): the one that the others' cards name, else the one in the middle."""
    for name, model in facts.items():
        repository = split_reference(model.reference).model
        known = (repository, "/".join(repository.rstrip("/").split("/")[-2:]))
        others = [other for other in facts.values() if other.name != name]
        if all(any(base in known for base in other.base_models) for other in others):
            return name, "the other models' cards name it as their base"
    if len(names) == 2:
        return names[0], "the first of two models; --base names another"
    sums = [sum(_distance(gram, j, i) for j in range(len(names))) for i in range(len(names))]
    middle = min(range(len(names)), key=lambda i: sums[i])
    return names[middle], "it lies between the others: it is nearest to all of them"

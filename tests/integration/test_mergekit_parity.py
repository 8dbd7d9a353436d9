"""The same recipe file through evomerge and through mergekit 0.1.5, tensor by tensor.

Under the policy 'mergekit' the bits are mergekit's. Under 'float32' results are mergekit's to the last place
of an element,
or to four of its tensor's largest where terms cancel, but for the entries that TIES keeps among those of
equal size. Every
method and more architectures are in test_parity_methods.py.

All files go through one mergekit process, because starting one takes longer than everything else here
together.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

import pytest
import torch
from safetensors.torch import load_file

from evomerge import _yaml
from evomerge.checkpoints import Checkpoint
from evomerge.errors import EvomergeError
from evomerge.export.recipe_file import merge_recipe_file
from evomerge.merging import checkpoint_writer, merge
from evomerge.recipes import Recipe, mergekit_yaml
from tests.support.learned_search import tensor_space
from tests.support.merge_cases import space
from tests.support.mergekit_recipes import CORNERS, DARE, DETERMINISTIC, block
from tests.support.parity_cases import finish, start, ulps
from tests.support.sweeps import sweep

# ---- recipes that both must read alike; $base, $math, $code, $chat are folders

HEADS = {
    "out-bfloat16": "dtype: float32\nout_dtype: bfloat16\n",
    "out-float32": "dtype: float32\nout_dtype: float32\n",
}

PAIRS = [("bf16", "out-bfloat16"), ("float32", "out-float32")]
CROSSED = [("bf16", "out-float32"), ("float32", "out-bfloat16")]

# ---- corners of the language: read once each, on models in float32


# ---- what mergekit makes something odd of: the head from as many models as the first slice has, whatever the

ODD = {
    "two-sources-after-a-slice-of-one": """
        dtype: float32
        merge_method: linear
        base_model: $base
        slices:
          - sources: [{model: $math, layer_range: [0, 2], parameters: {weight: 0.7}}]
          - sources: [{model: $code, layer_range: [2, 4], parameters: {weight: 0.7}}, {model: $chat,
                layer_range: [2, 4], parameters: {weight: 0.2}}]
        """,
}

# ---- what mergekit refuses; evomerge must refuse it too

REFUSED = {
    "no-weight": "{merge_method: task_arithmetic, base_model: $base, models: [{model: $math}]}",
    "no-weight-for-one": (
        "{merge_method: linear, base_model: $math, models: [{model: $math, parameters: "
        "{weight: 1}}, {model: $code}]}"
    ),
    "no-weight-outside-the-filters": """
        merge_method: ties
        base_model: $base
        models: [{model: $math, parameters: {weight: [{filter: mlp, value: 1}]}}]
        """,
    "no-t": "{merge_method: slerp, base_model: $base, models: [{model: $math}]}",
    "three-models-for-slerp": (
        "{merge_method: slerp, base_model: $base, models: [{model: $math}, {model: "
        "$code}], parameters: {t: 0.5}}"
    ),
    "two-models-passed-through": "{merge_method: passthrough, models: [{model: $math}, {model: $code}]}",
    "a-base-passed-through": "{merge_method: passthrough, base_model: $base, models: [{model: $math}]}",
    "no-base": "{merge_method: ties, models: [{model: $math, parameters: {weight: 1}}]}",
    "half-a-switch": (
        "{merge_method: linear, models: [{model: $math}], base_model: $math, parameters: "
        "{weight: 1, normalize: 0.5}}"
    ),
    "a-model-twice": (
        "{merge_method: linear, models: [{model: $math}, {model: $math}], parameters: {weight: 1}}"
    ),
    "no-base-in-a-slice": """
        merge_method: task_arithmetic
        base_model: $base
        slices: [{sources: [{model: $math, layer_range: [0, 4], parameters: {weight: 1}}]}]
        """,
    "a-mixed-list": (
        "{merge_method: linear, models: [{model: $math}], parameters: {weight: [1, {filter: mlp, value: 2}]}}"
    ),
    "models-and-slices": """
        merge_method: passthrough
        models: [{model: $math}]
        slices: [{sources: [{model: $math, layer_range: [0, 4]}]}]
        """,
    "unequal-lengths": """
        merge_method: linear
        slices: [{sources: [{model: $math, layer_range: [0, 4]}, {model: $code, layer_range: [0, 3]}]}]
        parameters: {weight: 1}
        """,
    "a-layer-too-far": (
        "{merge_method: passthrough, slices: [{sources: [{model: $math, layer_range: [2, 5]}]}]}"
    ),
    "unknown-method": "{merge_method: tiers, base_model: $base, models: [{model: $math}]}",
    "unknown-dtype": (
        "{dtype: float33, out_dtype: float32, merge_method: passthrough, models: [{model: $math}]}"
    ),
    "unknown-out-dtype": "{out_dtype: float33, merge_method: passthrough, models: [{model: $math}]}",
    "a-number-for-a-filter": (
        "{merge_method: linear, models: [{model: $math}], parameters: {weight: "
        "[{filter: 3, value: 1}, {value: 2}]}}"
    ),
    "text-for-a-weight": "{merge_method: linear, models: [{model: $math}], parameters: {weight: heavy}}",
}

# ---- what mergekit leaves out without a word and evomerge must name

IGNORED = {
    "weight-outside-parameters": (
        "{merge_method: linear, models: [{model: $math, weight: 3}], parameters: {weight: 1}}"
    ),
    "an-unknown-key": "{merge_method: passthrough, models: [{model: $math}], dtipe: float32}",
    "an-unknown-parameter": "{merge_method: passthrough, models: [{model: $math, parameters: {scael: 2}}]}",
    "a-parameter-of-the-merge-under-a-model": """
        merge_method: ties
        base_model: $base
        models: [{model: $math, parameters: {weight: 1, normalize: false}}]
        """,
}

# ---- what mergekit takes without a word and evomerge must refuse

SILENT = {
    "t-beyond-one": (
        "{merge_method: slerp, base_model: $base, models: [{model: $math}], parameters: {t: 1.5}}"
    ),
    "t-below-zero": (
        "{merge_method: slerp, base_model: $base, models: [{model: $math}], parameters: {t: -0.5}}"
    ),
    "a-key-twice": "merge_method: passthrough\nmodels: [{model: $math}]\nmodels: [{model: $code}]\n",
    "density-beyond-one": (
        "{merge_method: ties, base_model: $base, models: [{model: $math}], parameters: "
        "{weight: 1, density: 1.5}}"
    ),
}

# ---- random masks: alike in distribution only

DARE_ONE = {
    f"{method}-{'rescaled' if rescale else 'plain'}-{density}": f"""
        dtype: float32
        merge_method: {method}
        base_model: $base
        models: [{{model: $math, parameters: {{weight: 1.0, density: {density}}}}}]
        parameters: {{rescale: {str(rescale).lower()}}}
        """
    for method in ("dare_linear", "dare_ties")
    for rescale in (True, False)
    for density in (0.2, 0.7)
}

# ---- the way back: points of a search space, written as YAML


def points():
    for method in ("linear", "slerp", "task_arithmetic", "ties", "passthrough"):
        for number, out_dtype in enumerate(("bfloat16", "float32")):
            of = space(method, out_dtype)
            genome = torch.randn(len(of.axes), generator=torch.Generator().manual_seed(number)).tolist()
            yield f"{method}-{out_dtype}", of.decode(genome)
        plain = space(method, "float32")
        yield f"{method}-uniform", plain.uniform({})
    of = tensor_space(4, ("math", "code"))
    genome = torch.randn(len(of.axes), generator=torch.Generator().manual_seed(0)).tolist()
    yield "a-weight-for-each-tensor", replace(of.decode(genome), out_dtype="float32")


@dataclass(frozen=True)
class Job:
    """One file. ours, exact: where evomerge puts its merge under the policies 'float32' and 'mergekit';
    theirs: where mergekit does."""

    file: Path
    ours: Path
    exact: Path
    theirs: Path
    models: dict[str, Path]


@pytest.fixture(scope="session")
def jobs(
    request: pytest.FixtureRequest,
    tiny: dict[str, Path],
    tiny32: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Job]:
    """Every recipe file that a collected test needs, merged by evomerge and, in one process, by mergekit;
    names as in the tables.
    """
    work = tmp_path_factory.mktemp("parity")
    jobs: dict[str, Job] = {}
    collected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    pairs = {*PAIRS, *((p["kind"], p["head"]) for p in collected if {"kind", "head"} <= p.keys())}

    def add(name: str, text: str, models: dict[str, Path]) -> None:
        file = work / f"{name.replace('/', '_')}.yaml"
        file.write_text(Template(text).substitute(models), encoding="utf-8")
        jobs[name] = Job(file, *(file.with_suffix(end) for end in (".ours", ".exact", ".theirs")), models)

    for kind, models in (("bf16", tiny), ("float32", tiny32)):
        for name, text in DETERMINISTIC.items():
            for head, lines in HEADS.items():
                if (kind, head) in pairs:
                    add(f"{name}/{kind}/{head}", lines + block(text), models)
        shell = Checkpoint(models["base"])
        for name, recipe in points():
            named = mergekit_yaml.with_outer_filters(
                recipe, shell.layout.outer_names("embeddings"), shell.layout.outer_names("head")
            )
            add(
                f"back/{name}/{kind}",
                mergekit_yaml.dump(named, {n: str(path) for n, path in models.items()}, ["a header"]),
                models,
            )
    for table in (CORNERS, ODD, REFUSED, IGNORED, SILENT, DARE, DARE_ONE):
        for name, text in table.items():
            add(name, block(text), tiny32)
    try:
        process = start([(job.file, job.theirs) for job in jobs.values()])
    except FileNotFoundError as error:
        pytest.fail(str(error))
    for name, job in jobs.items():
        if name.split("/")[0] in DETERMINISTIC or name in CORNERS | ODD | DARE | DARE_ONE:
            merge_or_note(job)
    for theirs, error in finish(process).items():
        Path(theirs).with_suffix(".theirs-error").write_text(error)
    return jobs


def merge_or_note(job: Job) -> None:
    for target, policy in ((job.ours, "float32"), (job.exact, "mergekit")):
        try:
            merge_recipe_file(job.file, target, policy=policy)
        except EvomergeError as error:
            target.with_name(f"{target.name}-error").write_text(str(error))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a merged folder; fails with what its maker said if there is none."""
    assert not refusal(folder), f"{folder.name}: {refusal(folder)}"
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def read(job: Job) -> Recipe:
    return mergekit_yaml.load(
        _yaml.read(job.file), lambda reference: Checkpoint(Path(reference)).layout.num_layers
    )


def refusal(folder: Path) -> str:
    note = folder.with_name(f"{folder.name}-error")
    return note.read_text() if note.exists() else ""


def near(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Where two results are one unit in the last place apart at most, of the element, or four of the tensor's
    largest entry in float32."""
    return (ulps(ours, theirs) <= 1) | (
        (ours.double() - theirs.double()).abs() <= 2.0**-21 * theirs.double().abs().max()
    )


def assert_same(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, bitwise: bool = False
) -> None:
    assert sorted(ours) == sorted(theirs)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    for name, tensor in ours.items():
        differing = ulps(tensor, theirs[name]) > 0 if bitwise else ~near(tensor, theirs[name])
        assert not differing.any(), (
            f"{differing.sum()} of {differing.numel()} in {name} differ, by "
            f"{ulps(tensor, theirs[name]).max()} ulp"
        )


def assert_same_but_for_equal_sizes(
    job: Job, recipe: Recipe, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> None:
    """Among entries of one size at the edge of what TIES keeps, mergekit's choice follows a sort that is not
    stable.

    Hence: where the results differ, every entry has, in one of the task vectors, the one size that is at its
    edge.
    """
    parents = {
        **{n: Checkpoint(path) for n, path in job.models.items()},
        **{str(path): Checkpoint(path) for path in job.models.values()},
    }
    shell = parents[recipe.base]
    same, exempt = dict(ours), 0
    for name in ours:
        place = shell.layout.place(name)
        mix = {
            "embeddings": recipe.embeddings,
            "head": recipe.head,
            "layer": recipe.layers[place.layer or 0],
        }[place.part]
        read = [
            parents[m].tensor(name if layer is None else shell.layout.layer_name(layer, place.suffix)).float()
            for m, layer in (*mix.sources, mix.base)
        ]
        sizes = torch.stack([(x - read[-1]).abs() for x in read[:-1]])
        differing = ~near(ours[name], theirs[name])
        assert covered_by_one_level_each(sizes[:, differing]), (
            f"{differing.sum()} entries of {name} differ, not by the order of equal sizes"
        )
        exempt += int(differing.sum())
        same[name] = torch.where(differing, theirs[name], ours[name])
    assert exempt < 0.02 * sum(t.numel() for t in ours.values())
    assert_same(same, theirs)


def covered_by_one_level_each(sizes: torch.Tensor) -> bool:
    """Whether a number can be chosen for each row [rows, columns] so that every column has its row's number
    somewhere."""
    if sizes.shape[1] == 0:
        return True
    return any(
        covered_by_one_level_each(torch.cat([sizes[:i], sizes[i + 1 :]])[:, sizes[i] != sizes[i, 0]])
        for i in range(sizes.shape[0])
    )


@pytest.mark.parametrize(("kind", "head"), sweep([*PAIRS, *CROSSED], PAIRS))
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_recipe_file_merges_as_in_mergekit(jobs: dict[str, Job], name: str, kind: str, head: str):
    job = jobs[f"{name}/{kind}/{head}"]
    assert_same(tensors(job.exact), tensors(job.theirs), bitwise=True)
    if name.startswith("ties") and kind == "bf16":  # differences of bfloat16 numbers take few values
        assert_same_but_for_equal_sizes(job, read(job), tensors(job.ours), tensors(job.theirs))
    else:
        assert_same(tensors(job.ours), tensors(job.theirs))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (job.ours, job.theirs))
    assert (
        ours.items()
        >= {k: v for k, v in theirs.items() if k not in ("transformers_version", "_name_or_path")}.items()
    )


@pytest.mark.parametrize(
    "name", ["linear-2", "slerp-filters", "task-arithmetic-2", "ties-2", "passthrough-deeper"]
)
def test_a_dtype_narrower_than_float32_only_rounds_the_output(
    jobs: dict[str, Job], name: str, tmp_path: Path
):
    """mergekit with `dtype: bfloat16` alone also does its arithmetic in it; a merge here is never less exact
    than in float32."""
    job = jobs[f"{name}/bf16/out-bfloat16"]
    file = tmp_path / "narrow.yaml"
    file.write_text(job.file.read_text().replace(HEADS["out-bfloat16"], "dtype: bfloat16\n"))
    merge_recipe_file(file, tmp_path / "out")
    ours, wide = tensors(tmp_path / "out"), tensors(job.ours)
    assert all(torch.equal(ours[n], wide[n]) for n in wide)


@pytest.mark.parametrize("name", CORNERS)
def test_corners_of_the_language_merge_as_in_mergekit(jobs: dict[str, Job], name: str):
    assert_same(tensors(jobs[name].ours), tensors(jobs[name].theirs))
    assert_same(tensors(jobs[name].exact), tensors(jobs[name].theirs), bitwise=True)


@pytest.mark.parametrize("name", ODD)
def test_what_mergekit_reads_oddly_is_read_alike_or_refused(jobs: dict[str, Job], name: str):
    if not refusal(jobs[name].ours):
        assert_same(tensors(jobs[name].ours), tensors(jobs[name].theirs))


@pytest.mark.parametrize("kind", ["bf16", "float32"])
@pytest.mark.parametrize("name", [name for name, _ in points()])
def test_a_candidate_of_a_search_is_rebuilt_by_mergekit_from_its_file(
    jobs: dict[str, Job], name: str, kind: str, tmp_path: Path
):
    job = jobs[f"back/{name}/{kind}"]
    parents = {n: Checkpoint(path) for n, path in job.models.items()}
    recipe = dict(points())[name]
    checkpoint_writer.write(recipe, parents, tmp_path / "out")
    if name.startswith("ties") and kind == "bf16":
        assert_same_but_for_equal_sizes(job, recipe, tensors(tmp_path / "out"), tensors(job.theirs))
    else:
        assert_same(tensors(tmp_path / "out"), tensors(job.theirs))
    merge_recipe_file(job.file, tmp_path / "again")
    ours, again = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert all(torch.equal(ours[n], again[n]) for n in ours)


@pytest.mark.parametrize("name", REFUSED)
def test_what_mergekit_refuses_is_refused_with_its_place(jobs: dict[str, Job], name: str, tmp_path: Path):
    assert refusal(jobs[name].theirs), "mergekit takes this; move it to another table"
    with pytest.raises(EvomergeError) as error:
        merge_recipe_file(jobs[name].file, tmp_path / "out")
    assert re.match(rf"{re.escape(str(jobs[name].file))}:\d+:\d+ ", str(error.value)), (
        f"no place in: {error.value}"
    )


@pytest.mark.parametrize("name", IGNORED)
def test_what_mergekit_leaves_out_is_left_out_and_named_with_its_place(
    jobs: dict[str, Job], name: str, tmp_path: Path
):
    job = jobs[name]
    assert not refusal(job.theirs), "mergekit refuses this; move it to another table"
    warnings = merge_recipe_file(job.file, tmp_path / "out")
    assert any(re.search(rf"{re.escape(str(job.file))}:\d+:\d+ ", warning) for warning in warnings), warnings
    assert_same(tensors(tmp_path / "out"), tensors(job.theirs))


@pytest.mark.parametrize("name", SILENT)
def test_what_mergekit_takes_without_a_word_is_diagnosed(jobs: dict[str, Job], name: str, tmp_path: Path):
    assert not refusal(jobs[name].theirs), "mergekit refuses this; move it to another table"
    with pytest.raises(EvomergeError) as error:
        merge_recipe_file(jobs[name].file, tmp_path / "out")
    assert re.match(rf"{re.escape(str(jobs[name].file))}:\d+:\d+ ", str(error.value)), (
        f"no place in: {error.value}"
    )


# ---- DARE


@pytest.mark.parametrize("name", DARE_ONE)
def test_dare_keeps_and_scales_one_task_vector_as_mergekit_does(
    jobs: dict[str, Job], name: str, tiny32: dict[str, Path]
):
    density = float(name.rsplit("-", 1)[1])
    base, math = tensors(tiny32["base"]), tensors(tiny32["math"])
    for merged in (tensors(jobs[name].ours), tensors(jobs[name].theirs)):
        kept_in_all = counted_in_all = 0
        for key, tensor in merged.items():
            delta = math[key] - base[key]
            kept = tensor != base[key]
            counted, n = int((delta != 0).sum()), int(kept.sum())
            assert not kept[delta == 0].any()
            assert abs(n - density * counted) <= 5 * (counted * density * (1 - density)) ** 0.5, key
            kept_in_all, counted_in_all = kept_in_all + n, counted_in_all + counted
            if "plain" in name:
                assert torch.equal(tensor, torch.where(kept, base[key] + delta, base[key])), key
            elif n:  # of a short vector all may be dropped
                assert (tensor - base[key]).abs().sum().item() == pytest.approx(
                    delta.abs().sum().item(), rel=1e-4, abs=1e-6
                ), key
        assert (
            abs(kept_in_all - density * counted_in_all)
            <= 4 * (counted_in_all * density * (1 - density)) ** 0.5
        )


@pytest.mark.parametrize("name", DARE)
def test_dare_of_two_is_mergekits_up_to_the_masks(jobs: dict[str, Job], name: str, tiny32: dict[str, Path]):
    """Over many seeds our changes of the base spread; mergekit's one draw lies where ours do."""
    base = tensors(tiny32["base"])
    parents = {str(path): Checkpoint(path) for path in tiny32.values()}
    recipe = read(jobs[name])
    draws = [dict(merge.merged_tensors(replace(recipe, seed=seed), parents)) for seed in range(1, 17)]
    theirs = tensors(jobs[name].theirs)
    for key in base:
        for measure in (
            lambda t, k=key: (t - base[k]).abs().sum(),
            lambda t, k=key: (t != base[k]).double().mean(),
            lambda t, k=key: t.double().sum(),
        ):
            seen = torch.stack([measure(draw[key]).double() for draw in draws])
            slack = 6 * seen.std() + 1e-3 * seen.abs().mean()
            assert (measure(theirs[key]) - seen.mean()).abs() <= slack, (
                f"{key}: mergekit {measure(theirs[key])}, ours {seen.mean()} ± {seen.std()}"
            )

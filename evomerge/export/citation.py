"""What an exported model is cited by, and the versions that it was found with."""

from __future__ import annotations

import re

from evomerge import __version__
from evomerge.export.stored_candidate import StoredCandidate
from evomerge.methods import method

BIBLIOGRAPHY = "CITATION.bib"
"""Name of the file with BibTeX entries."""
ENVIRONMENT = "environment.txt"
"""Name of the file with the versions, in pip's form."""
_PAPERS = {  # arXiv number -> first author, title, year
    "2203.05482": (
        "Wortsman, Mitchell",
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
        "inference time",
        2022,
    ),
    "2212.04089": ("Ilharco, Gabriel", "Editing Models with Task Arithmetic", 2022),
    "2306.01708": ("Yadav, Prateek", "TIES-Merging: Resolving Interference When Merging Models", 2023),
    "2311.03099": (
        "Yu, Le",
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        2023,
    ),
    "2312.06795": (
        "Davari, MohammadReza",
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        2023,
    ),
    "2312.15166": (
        "Kim, Dahyun",
        "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
        2023,
    ),
    "2403.13187": ("Akiba, Takuya", "Evolutionary Optimization of Model Merging Recipes", 2024),
    "2403.13257": (
        "Goddard, Charles",
        "Arcee's MergeKit: A Toolkit for Merging Large Language Models",
        2024,
    ),
    "2403.19522": ("Jang, Dong-Hwan", "Model Stock: All we need is just a few fine-tuned models", 2024),
    "2406.11617": (
        "Deep, Pala Tej",
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        2024,
    ),
    "2408.07990": ("Wan, Fanqi", "FuseChat: Knowledge Fusion of Chat Models", 2024),
}
_SEARCH, _MERGEKIT = "2403.13187", "2403.13257"
_OF_PYTHON = ("python",)  # versions that pip does not install


def bibliography(candidate: StoredCandidate) -> str:
    """Writes BibTeX entries: evomerge, the search for merges, mergekit's recipes, the method's papers.

    Args:
        candidate: What is exported.

    Returns:
        The text of the file; a paper whose title is not known here is cited by its number.
    """
    numbers = [_SEARCH, _MERGEKIT]
    for name in candidate.methods:
        numbers += re.findall(r"\d{4}\.\d{4,5}", method(name).paper)
    entries = [
        "@software{evomerge,\n"
        "  title = {{evomerge}: evolutionary search for merge recipes of language models},\n"
        "  author = {{The evomerge contributors}},\n"
        f"  version = {{{__version__}}},\n"
        "}"
    ]
    return "\n\n".join([*entries, *(_entry(number) for number in dict.fromkeys(numbers))]) + "\n"


def environment(candidate: StoredCandidate) -> str:
    """Writes the versions that a study was scored with, as pip reads them.

    Args:
        candidate: What is exported.

    Returns:
        The text of the file; a local version, such as a CPU build's '+cpu', is left to a comment.
    """
    versions = candidate.study.facts.versions
    python = f" on Python {versions['python']}" if "python" in versions else ""
    lines = [f"# what study {candidate.study.name} was scored with{python}; mergekit 0.1.5 reads its recipe"]
    for name, version in sorted(versions.items()):
        if name in _OF_PYTHON or not re.fullmatch(r"[\w.+!-]+", str(version)):
            continue
        public, _, local = str(version).partition("+")
        lines.append(f"{name}=={public}{f'  # {version}' if local else ''}")
    return "\n".join(lines) + "\n"


def _entry(number: str) -> str:
    fields = [f"  eprint = {{{number}}},", "  archivePrefix = {arXiv},"]
    if number in _PAPERS:
        author, title, year = _PAPERS[number]
        fields = [f"  title = {{{{{title}}}}},", f"  author = {{{author} and others}},", *fields]
        fields.append(f"  year = {{{year}}},")
    return "\n".join([f"@misc{{arxiv-{number},", *fields, "}"])

"""The job of a cluster that runs a search file: scripts/cluster's templates, filled in."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evomerge import _resources
from evomerge.errors import SetupError

Kind = Literal["slurm", "ray", "kuberay"]
_TEMPLATES: dict[Kind, str] = {"slurm": "evomerge.slurm", "ray": "submit.sh", "kuberay": "rayjob.yaml"}
_SUFFIXES: dict[Kind, str] = {"slurm": ".slurm", "ray": ".ray.sh", "kuberay": ".kuberay.yaml"}


@dataclass(frozen=True, slots=True)
class JobFile:
    """A job that runs a search.

    Attributes:
        kind: 'slurm' for sbatch, 'ray' for a job of a Ray cluster that runs, 'kuberay' for kubectl apply.
        nodes: Nodes of the cluster with GPUs; of Kubernetes, pods.
        gpus: GPUs of each node.
        root: Folder of the studies, on a disk that the driver's machine sees whenever it starts.
    """

    kind: Kind
    nodes: int = 1
    gpus: int = 8
    root: str | None = None

    def path(self, search_file: Path) -> Path:
        """Where the job goes.

        Args:
            search_file: The search file.

        Returns:
            A file beside it.
        """
        return search_file.with_name(search_file.stem + _SUFFIXES[self.kind])

    def command(self, search_file: Path) -> str:
        """What starts the job.

        Args:
            search_file: The search file.

        Returns:
            A command for a shell.
        """
        file = shlex.quote(str(self.path(search_file)))
        starts: dict[Kind, str] = {
            "slurm": f"sbatch {file}",
            "ray": f"RAY_ADDRESS=http://HEAD:8265 {file}",
            "kuberay": f"kubectl apply -f {file}",
        }
        return starts[self.kind]


def job_text(job: JobFile, search_file: Path, study: str) -> str:
    """Fills in the template of a job.

    Args:
        job: The job.
        search_file: The search file that it runs.
        study: Name of the study.

    Returns:
        The file.

    Raises:
        SetupError: The template is missing.
    """
    template = _resources.cluster_templates() / _TEMPLATES[job.kind]
    try:
        text = template.read_text(encoding="utf-8")
    except OSError as error:
        raise SetupError(
            f"the template {template} is missing ({error.strerror}); install evomerge anew"
        ) from None
    config = search_file.absolute()
    words = [str(config), *(["--root", str(Path(job.root).expanduser().absolute())] if job.root else [])]
    if job.kind == "kuberay":
        return _kuberay(text, job, words, study)
    if job.kind == "slurm":
        text = _replaced(text, r"--job-name=\S+", f"--job-name={study}")
        text = _replaced(text, r"--nodes=\d+(?=\n#SBATCH)", f"--nodes={job.nodes}")
        text = _replaced(text, r"--gpus-per-node=\d+", f"--gpus-per-node={job.gpus}")
        text = _replaced(text, r"--output=evomerge-", f"--output={study}-")
    usage = (
        f"#   sbatch {job.path(search_file).name}"
        if job.kind == "slurm"
        else f"#   {job.command(search_file)}"
    )
    text = _replaced(text, r"#   (?:sbatch|RAY_ADDRESS)[^\n]*", usage + "  [more options of evomerge run]")
    return _replaced(text, r"\nif \[ \$# -eq 0 \]; then\n.*?\nfi", f'\nset -- {shlex.join(words)} "$@"')


def _kuberay(text: str, job: JobFile, words: list[str], study: str) -> str:
    """A RayJob; Kubernetes wants names of small letters, digits and '-'."""
    name = re.sub(r"[^a-z0-9]+", "-", study.lower()).strip("-")[:40] or "evomerge"
    command = [
        "evomerge",
        "run",
        f"/data/{Path(words[0]).name}",
        "--resume",
        "--ray",
        "auto",
        "--grace",
        "60",
    ]
    command += words[1:] or ["--root", "/data/studies"]
    text = _replaced(text, r"(?<=\n  name: )evomerge", name)
    text = _replaced(text, r"(?<=\n  entrypoint: )[^\n]+", json.dumps(shlex.join(command)))
    for key in ("replicas", "maxReplicas"):
        text = _replaced(text, rf"(?<=\n        {key}: )\d+", str(job.nodes))
    text = _replaced(text, r"apply -f rayjob\.yaml", f"apply -f {job.path(Path(words[0])).name}")
    return re.sub(r'(?<=nvidia\.com/gpu: )"\d+"', f'"{job.gpus}"', text)


def _replaced(text: str, pattern: str, by: str) -> str:
    """The text with the first match replaced. Raises SetupError where there is none."""
    changed, count = re.subn(pattern, lambda found: by, text, count=1, flags=re.DOTALL)
    if not count:
        raise SetupError(f"a template of scripts/cluster has no place for '{by[:60]}'; install evomerge anew")
    return changed

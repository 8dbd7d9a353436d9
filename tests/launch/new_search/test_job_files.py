"""Job files: the templates of scripts/cluster with the search in them, run with stand-ins for programs."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from evomerge.launch.new_search.job_files import JobFile, job_text
from tests.support.toy import REPO

STUB = '#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n[ "$1 $2" != "show hostnames" ] || echo node1\n'


def run(tmp_path: Path, job: JobFile, *words: str) -> list[str]:
    """What a job calls, a line each, with stand-ins that end at once."""
    config = tmp_path / "my search.yaml"
    file = job.path(config)
    file.write_text(job_text(job, config, "my-study"))
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("scontrol", "srun", "ray", "evomerge"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
    }
    shell = "sh" if job.kind == "ray" else "bash"
    subprocess.run([shell, file, *words], env=environment, check=True, timeout=60)
    return (tmp_path / "calls").read_text().splitlines()


def test_a_slurm_job_runs_the_search_with_its_sizes(tmp_path: Path) -> None:
    job = JobFile("slurm", nodes=3, gpus=4, root=str(tmp_path / "studies"))
    calls = run(tmp_path, job, "--accept-floor")
    (driver,) = [call for call in calls if call.startswith("evomerge ")]
    assert driver.startswith(
        f"evomerge run {tmp_path}/my search.yaml --root {tmp_path}/studies --accept-floor"
    )
    assert "--resume" in driver
    lines = job.path(tmp_path / "my search.yaml").read_text().splitlines()
    for line in ("#SBATCH --nodes=3", "#SBATCH --gpus-per-node=4", "#SBATCH --job-name=my-study"):
        assert line in lines
    assert shlex.split(job.command(Path("a b.yaml"))) == ["sbatch", "a b.slurm"]


def test_a_ray_job_submits_the_search(tmp_path: Path) -> None:
    (call,) = run(tmp_path, JobFile("ray"))
    assert f"-- evomerge run {tmp_path}/my search.yaml --resume --ray auto" in call


def test_a_kuberay_job_names_the_search_on_its_volume() -> None:
    job = JobFile("kuberay", nodes=5, gpus=2)
    found = yaml.safe_load(job_text(job, Path("/home/me/search.yaml"), "My_Study"))
    template = yaml.safe_load((REPO / "scripts" / "cluster" / "rayjob.yaml").read_text())
    assert found["metadata"]["name"] == "my-study"
    assert found["spec"]["entrypoint"] == template["spec"]["entrypoint"]
    workers = found["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (workers["replicas"], workers["maxReplicas"]) == (5, 5)
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "2"


@pytest.mark.parametrize("kind", ["slurm", "ray"])
def test_a_job_is_a_shell_program(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "job"
    file.write_text(job_text(JobFile(kind), tmp_path / "it's.yaml", "study"))  # type: ignore[arg-type]
    subprocess.run(["bash", "-n", file], check=True, timeout=60)

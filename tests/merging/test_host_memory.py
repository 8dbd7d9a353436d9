"""Memory that a process may use: files of /proc and /sys as systems write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.merging.host_memory import HostMemory, available_memory, host_memory

GIB = 1 << 30
MEMINFO = {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1024 kB\nMemAvailable: {48 << 20} kB\n"}


def system(root: Path, files: dict[str, object]) -> Path:
    """A folder with files as they are below '/'."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_the_page_cache_is_available(tmp_path: Path) -> None:
    assert host_memory(system(tmp_path, {**MEMINFO})) == HostMemory(64 * GIB, 48 * GIB)


def test_the_limit_of_a_container_is_its_total_and_its_page_cache_is_given_up(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": 16 * GIB,
        "sys/fs/cgroup/memory.current": 15 * GIB,
        "sys/fs/cgroup/memory.stat": f"anon 7\nactive_file {3 * GIB}\ninactive_file {8 * GIB}\nfile 1",
    }
    assert host_memory(system(tmp_path, {**MEMINFO, **files})) == HostMemory(16 * GIB, 12 * GIB)


def test_the_limit_of_a_group_around_the_own_holds(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/jobs/job_7/step_0",
        "sys/fs/cgroup/jobs/job_7/memory.max": 8 * GIB,
        "sys/fs/cgroup/jobs/job_7/memory.current": 2 * GIB,
        "sys/fs/cgroup/jobs/job_7/step_0/memory.max": "max",
        "sys/fs/cgroup/jobs/job_7/step_0/memory.current": 1 * GIB,
    }
    assert host_memory(system(tmp_path, {**MEMINFO, **files})) == HostMemory(8 * GIB, 6 * GIB)


def test_version_1_of_control_groups_is_read_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n0::/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": (1 << 63) - 4096,  # none
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 20 * GIB,
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 4 * GIB,
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": 3 * GIB,
        "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 5\ntotal_inactive_file {2 * GIB}",
    }
    assert host_memory(system(tmp_path, {**MEMINFO, **files})) == HostMemory(4 * GIB, 3 * GIB)


def test_the_root_counts_where_the_own_path_is_that_of_another_name_space(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/kubepods/pod1/abc", "sys/fs/cgroup/memory.max": 2 * GIB}
    assert host_memory(system(tmp_path, {**MEMINFO, **files})).total == 2 * GIB


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/meminfo": "MemTotal: much\n"},
        {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "1"},
    ],
)
def test_what_a_system_does_not_say_is_unknown(tmp_path: Path, files: dict[str, object]) -> None:
    assert host_memory(system(tmp_path, files)) == HostMemory(0, None)


def test_this_machine_has_some() -> None:
    assert 0 < available_memory() <= host_memory().total

"""Limits of control groups, read from folder trees like those that the kernel shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyembed import _cgroup

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)
UNLIMITED_V1 = "9223372036854771712\n"


def make_tree(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    """A root folder with the two files of /proc/self and the files of control groups."""
    files = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_v2(tmp_path: Path) -> None:
    """Version 2: the limits of the process's own group; a broken quota is rounded up."""
    files = {
        "sys/fs/cgroup/job/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/job/memory.max": "1073741824\n",
    }
    root = make_tree(tmp_path, "0::/job\n", V2, files)
    assert _cgroup.cpu_quota(root) == 3
    assert _cgroup.memory_limit(root) == 1 << 30


def test_v1(tmp_path: Path) -> None:
    """Version 1: each controller has a mount of its own, and the group may differ between them."""
    files = {
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/b/memory.limit_in_bytes": "4096000\n",
    }
    root = make_tree(tmp_path, "4:memory:/b\n2:cpu,cpuacct:/a\n1:name=systemd:/\n", V1, files)
    assert _cgroup.cpu_quota(root) == 2
    assert _cgroup.memory_limit(root) == 4096000


@pytest.mark.parametrize("inner", ["max", "800000"])
def test_the_smallest_limit_of_nested_groups_holds(tmp_path: Path, inner: str) -> None:
    """The limit of an ancestor holds for the group below it, whatever that group says."""
    files = {
        "sys/fs/cgroup/slice/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/slice/memory.max": "5000000\n",
        "sys/fs/cgroup/slice/job/cpu.max": f"{inner} 100000\n",
        "sys/fs/cgroup/slice/job/memory.max": "max\n",
        "sys/fs/cgroup/slice/job/task/cpu.max": "max 100000\n",
        "sys/fs/cgroup/slice/job/task/memory.max": "6000000\n",
        "sys/fs/cgroup/neighbour/cpu.max": "100000 100000\n",
    }
    root = make_tree(tmp_path, "0::/slice/job/task\n", V2, files)
    assert _cgroup.cpu_quota(root) == 2
    assert _cgroup.memory_limit(root) == 5000000


def test_nested_groups_of_v1(tmp_path: Path) -> None:
    """An ancestor's limit holds in version 1 too."""
    cpu, memory = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/memory"
    files = {
        f"{cpu}/a/cpu.cfs_quota_us": "100000\n",
        f"{cpu}/a/cpu.cfs_period_us": "100000\n",
        f"{cpu}/a/b/cpu.cfs_quota_us": "-1\n",
        f"{cpu}/a/b/cpu.cfs_period_us": "100000\n",
        f"{memory}/memory.limit_in_bytes": UNLIMITED_V1,
        f"{memory}/a/memory.limit_in_bytes": "7000000\n",
        f"{memory}/a/b/memory.limit_in_bytes": "9000000\n",
    }
    root = make_tree(tmp_path, "4:memory:/a/b\n2:cpu,cpuacct:/a/b\n", V1, files)
    assert _cgroup.cpu_quota(root) == 1
    assert _cgroup.memory_limit(root) == 7000000


def test_both_versions_at_once(tmp_path: Path) -> None:
    """On a hybrid system a controller is found where it is mounted."""
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    files = {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "8000000\n"}
    root = make_tree(tmp_path, "4:memory:/a\n0::/\n", V1 + unified, files)
    assert _cgroup.cpu_quota(root) is None
    assert _cgroup.memory_limit(root) == 8000000


@pytest.mark.parametrize(
    "group", ["/docker/0a1b", "/", "/../../elsewhere"], ids=["mounted", "namespace", "outside"]
)
def test_a_container_sees_its_own_group(tmp_path: Path, group: str) -> None:
    """In a container the mounted folder is the container's group, however its path is written."""
    mount = V2.replace("0:28 / ", "0:28 /docker/0a1b ")
    files = {
        "sys/fs/cgroup/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/memory.max": "3000000\n",
    }
    root = make_tree(tmp_path, f"0::{group}\n", mount, files)
    assert _cgroup.cpu_quota(root) == 3
    assert _cgroup.memory_limit(root) == 3000000


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    """The escapes of mountinfo are decoded."""
    mount = V2.replace("/sys/fs/cgroup", r"/my\040groups")
    root = make_tree(tmp_path, "0::/\n", mount, {"my groups/memory.max": "2000000\n"})
    assert _cgroup.memory_limit(root) == 2000000


def test_no_limit(tmp_path: Path) -> None:
    """The words for "no limit" of both versions are no limits, and neither are missing files."""
    files = {
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
    }
    root = make_tree(tmp_path / "a", "0::/\n2:cpu,cpuacct:/\n4:memory:/gone\n", V2 + V1, files)
    for each in (root, make_tree(tmp_path / "b", "0::/\n", V2, {}), tmp_path / "missing"):
        assert _cgroup.cpu_quota(each) is None
        assert _cgroup.memory_limit(each) is None


def test_this_machine() -> None:
    """The files of this machine can be read."""
    quota, limit = _cgroup.cpu_quota(), _cgroup.memory_limit()
    assert quota is None or quota >= 1
    assert limit is None or limit > 1 << 20

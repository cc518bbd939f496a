"""How many cores a process may use."""

import os

import pytest

from rl.machine import usable_cores


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    monkeypatch.setattr("rl.machine._CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    (tmp_path / "cpu").mkdir()
    return tmp_path


def test_the_affinity_counts_and_not_the_machine(cgroups):
    assert usable_cores() == 16


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000\n", 16),
        ("400000 100000\n", 4),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("9900000 100000", 16),
    ],
)
def test_a_containers_quota_is_not_exceeded(cgroups, limit, cores):
    (cgroups / "cpu.max").write_text(limit)
    assert usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1\n", 16), ("300000\n", 3)])
def test_nor_that_of_the_first_version_of_control_groups(cgroups, quota, cores):
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (cgroups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == cores

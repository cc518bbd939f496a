"""The tie between an engine's processes and their owner, and the merging of the workers' digests."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from rollout.process_tie import OWNER_VARIABLE, own
from rollout.vllm_engine import merge_digests

CHILD = """
import time
from rollout.process_tie import tie_to_owner
tie_to_owner()
print("tied", flush=True)
time.sleep(60)
"""
OWNER = f"""
import os, subprocess, sys
from rollout.process_tie import own
sockets = own(os.environ)
print(sockets.name, flush=True)
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), child.pid, flush=True)
child.wait()
"""


def test_child_dies_with_a_killed_owner_and_takes_the_sockets_along() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    sockets = Path(owner.stdout.readline().strip())
    state, pid = owner.stdout.readline().split()
    assert state == "tied"
    assert sockets.is_dir()
    watch = os.pidfd_open(int(pid))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert select.select([watch], [], [], 20.0)[0], "the child outlived its owner"
    os.close(watch)
    assert not sockets.exists()


def test_each_engine_has_a_directory_of_its_own_where_the_user_wants_it(tmp_path) -> None:
    environment = {"VLLM_RPC_BASE_PATH": str(tmp_path)}
    first = own(environment)
    assert Path(first.name).parent == tmp_path
    first.cleanup()
    with own(environment) as second:
        assert Path(second).is_dir() and environment["VLLM_RPC_BASE_PATH"] == second != first.name


def test_child_of_an_owner_that_is_gone_ends_at_once() -> None:
    environment = dict(os.environ)
    with own(environment) as sockets:
        assert environment["VLLM_RPC_BASE_PATH"] == sockets
    pid, start_time = environment[OWNER_VARIABLE].split(":")
    environment[OWNER_VARIABLE] = f"{pid}:{int(start_time) + 1}"  # the pid now belongs to another process
    result = subprocess.run([sys.executable, "-c", CHILD], env=environment, check=False, timeout=50)
    assert result.returncode == -signal.SIGKILL


def test_owner_itself_and_foreign_processes_are_left_alone() -> None:
    script = (
        "import os; from rollout.process_tie import own, tie_to_owner; tie_to_owner(); "
        "sockets = own(os.environ); tie_to_owner(); assert os.path.isdir(sockets.name)"
    )
    environment = {k: v for k, v in os.environ.items() if k != OWNER_VARIABLE}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=50).returncode == 0


def test_workers_that_disagree_are_not_merged_away() -> None:
    assert merge_digests([{"a": 1, "b": 2}]) == {"a": 1, "b": 2}
    assert merge_digests([{"a": 1, "b": 2}, {"a": 1, "b": 3}]) == {"a": 1, "b": 3}
    assert merge_digests([{"a": 1, "b": 2}, {"a": 1}]) == {"a": 1, "b": -1}
    assert merge_digests([{"a": 1}, {"a": 1, "b": 3}]) == {"a": 1, "b": 3}

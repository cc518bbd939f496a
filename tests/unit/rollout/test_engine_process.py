"""The tie between an engine's processes and their owner, and the merging of the workers' digests."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rl.config import ModelConfig, RolloutConfig
from rollout.process_tie import OWNER_VARIABLE, note_meeting, own
from rollout.vllm_engine import VLLMEngine, merge_digests
from rollout.vllm_options import EngineSpec

CHILD = """
import errno, os, sys, time
if "no_pidfd" in sys.argv:
    def pidfd_open(*_):
        raise OSError(errno.ENOSYS, "not there, as in gVisor")
    os.pidfd_open = pidfd_open
from rollout.process_tie import note_meeting, tie_to_owner
tie_to_owner()
note_meeting("file://" + sys.argv[1])
print("tied", flush=True)
time.sleep(60)
"""
OWNER = f"""
import os, subprocess, sys
from rollout.process_tie import own
files = own(os.environ)
print(os.environ["VLLM_RPC_BASE_PATH"], flush=True)
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), child.pid, flush=True)
child.wait()
"""


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        yield Path(directory)


def left_by_vllm(directory: Path) -> list[Path]:
    """The file over which workers met, and shared memory that is named after it."""
    meeting = directory / f"vllm_dist_{uuid.uuid4().hex}"
    segment = Path("/dev/shm") / f"{meeting.name}-tp:0-[0-1]-cpushm_0"
    for path in (meeting, segment):
        path.write_text("left")
    return [meeting, segment]


@pytest.mark.parametrize("kernel", ["pidfd", "no_pidfd"])
def test_child_dies_with_a_killed_owner_and_takes_the_files_along(tmp_path: Path, kernel: str) -> None:
    left = left_by_vllm(tmp_path)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(left[0]), kernel], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    sockets = Path(owner.stdout.readline().strip())
    state, pid = owner.stdout.readline().split()
    assert state == "tied"
    assert sockets.is_dir()
    child = psutil.Process(int(pid))
    owner.send_signal(signal.SIGKILL)  # and not waited for, as in a container whose first process reaps nobody
    _, alive = psutil.wait_procs([child], timeout=20.0)
    assert not alive, "the child outlived its owner"
    owner.wait()
    assert not any(path.exists() for path in (sockets, *left))


def test_an_engines_files_go_with_it_and_are_where_the_user_wants_them(base: Path) -> None:
    environment = {"VLLM_RPC_BASE_PATH": str(base)}
    first, directories = own(environment), [Path(environment["VLLM_RPC_BASE_PATH"])]
    assert directories[0].parent == base
    first.cleanup()
    second = own(environment)
    directories.append(Path(environment["VLLM_RPC_BASE_PATH"]))
    assert [directory.is_dir() for directory in directories] == [False, True]
    others, left = left_by_vllm(base), left_by_vllm(base)
    second.own_meeting(note_meeting(f"file://{left[0]}"))
    second.cleanup()
    assert not any(path.exists() for path in (*directories, *left))
    assert all(path.exists() for path in others)
    assert note_meeting("tcp://127.0.0.1:1") == ""  # which also forgets the one above, in this process
    for path in others:
        path.unlink()


@pytest.mark.parametrize(("length", "fits"), [(47, True), (48, False)])
def test_sockets_fit_where_the_temporary_directory_is_long(base: Path, length: int, fits: bool) -> None:
    long = base / ("x" * (length - len(str(base)) - 1))
    long.mkdir()
    environment = {"VLLM_RPC_BASE_PATH": str(long)}
    files = own(environment)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{files.directory}/{uuid.uuid4()}")  # as vLLM names them
    files.cleanup()
    assert Path(files.directory).parent == (long if fits else Path("/tmp"))


def test_an_engine_that_is_ended_while_it_starts_leaves_no_files(base: Path) -> None:
    engine = VLLMEngine(EngineSpec(ModelConfig(path="m"), RolloutConfig(), "shm", max_model_len=8, seed=0))
    asyncio.run(engine.shutdown())
    engine._files = own({"VLLM_RPC_BASE_PATH": str(base)})
    asyncio.run(engine.shutdown())
    asyncio.run(engine.shutdown())
    assert not list(base.iterdir())


def test_what_was_left_where_everything_was_killed_is_removed_by_the_next_owner(base: Path) -> None:
    script = """
import os, sys, time
from rollout.process_tie import own
files = own(os.environ)
files.own_meeting(sys.argv[1])
print(files.directory, flush=True)
time.sleep(60)
"""
    lefts = [left_by_vllm(base), left_by_vllm(base)]
    environment = os.environ | {"VLLM_RPC_BASE_PATH": str(base)}
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(left[0])], env=environment, stdout=subprocess.PIPE, text=True
        )
        for left in lefts
    ]
    directories = [Path(owner.stdout.readline().strip()) for owner in owners if owner.stdout is not None]
    precious = base / "precious"
    precious.write_text("of somebody")
    strange = unlike_an_engine(base, precious)
    owners[0].kill()
    owners[0].wait()
    try:
        assert all(directory.is_dir() for directory in directories)
        own({"VLLM_RPC_BASE_PATH": str(base)}).cleanup()
        assert [directory.exists() for directory in directories] == [False, True], "the second owner lives"
        assert [any(path.exists() for path in left) for left in lefts] == [False, True]
    finally:
        owners[1].kill()
        owners[1].wait()
    own({"VLLM_RPC_BASE_PATH": str(base)}).cleanup()
    assert not any(path.exists() for left in lefts for path in left)
    assert set(strange) <= set(base.rglob("*"))


def unlike_an_engine(base: Path, precious: Path) -> list[Path]:
    """Directories that look like an engine's, but are not to be removed or believed."""
    kinds = ("open", "binary", "pipe", "link", "none")
    directories = {kind: base / f"fledge-engine-{kind}" for kind in kinds}
    for kind, directory in directories.items():
        directory.mkdir(mode=0o755 if kind == "open" else 0o700)
    locks = {kind: directory / ".fledge-engine.lock" for kind, directory in directories.items()}
    locks["open"].write_text(str(precious))  # anybody who may write to the base could have made it
    locks["binary"].write_bytes(b"\xff\x00")
    os.mkfifo(locks["pipe"])
    locks["link"].symlink_to(precious)
    (base / "fledge-engine-file").write_text("a file")
    del directories["pipe"]  # may go; it must not be waited for
    return [*directories.values(), base / "fledge-engine-file", precious]


def test_child_of_an_owner_that_is_gone_ends_at_once() -> None:
    environment = dict(os.environ)
    files = own(environment)
    pid, start_time = environment[OWNER_VARIABLE].split(":")
    environment[OWNER_VARIABLE] = f"{pid}:{int(start_time) + 1}"  # the pid now belongs to another process
    result = subprocess.run([sys.executable, "-c", CHILD, "none"], env=environment, check=False, timeout=50)
    assert result.returncode == -signal.SIGKILL
    files.cleanup()


def test_owner_itself_and_foreign_processes_are_left_alone() -> None:
    script = (
        "import os; from rollout.process_tie import own, tie_to_owner; tie_to_owner(); "
        "files = own(os.environ); tie_to_owner(); assert os.path.isdir(os.environ['VLLM_RPC_BASE_PATH'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != OWNER_VARIABLE}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False, timeout=50).returncode == 0


def test_workers_that_disagree_are_not_merged_away() -> None:
    assert merge_digests([{"a": 1, "b": 2}]) == {"a": 1, "b": 2}
    assert merge_digests([{"a": 1, "b": 2}, {"a": 1, "b": 3}]) == {"a": 1, "b": 3}
    assert merge_digests([{"a": 1, "b": 2}, {"a": 1}]) == {"a": 1, "b": -1}
    assert merge_digests([{"a": 1}, {"a": 1, "b": 3}]) == {"a": 1, "b": 3}

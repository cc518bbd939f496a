"""Starts a script as ranks of one process group on this machine, waits for all; and how such a rank ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from torch.distributed import TCPStore

_TIMEOUT_S = 560  # a minute at most on two idle cores


@contextmanager
def meeting() -> Iterator[dict[str, str]]:
    """The environment of ranks that meet at a store in this process, so that no other program can take its port."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def run_ranks(script: str, out_dir: Path, *, ranks: int = 2, **environment: str) -> None:
    """Run `python SCRIPT OUT_DIR` (of this folder) on each rank; fails with the ends of their logs unless all exit with
    0."""
    common = {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    common["PYTHONFAULTHANDLER"] = "1"
    logs = [out_dir / f"rank{rank}_of_{ranks}.log" for rank in range(ranks)]
    with meeting() as place:
        processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / script), str(out_dir)],
                env=os.environ | common | place | environment | {"RANK": str(rank)},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(timeout=_TIMEOUT_S) for process in processes]
        except subprocess.TimeoutExpired:
            codes = []
        finally:
            for process in processes:
                process.kill()
                process.wait()
    assert codes == [0] * ranks, "\n".join([f"exit codes {codes}", *(log.read_text()[-4000:] for log in logs)])


def end_rank() -> NoReturn:
    """End this process successfully, without an orderly shutdown of Python.

    A thread of torch's gloo group may be dropping the tensors of a collective that has just ended, for which it needs
    the interpreter. If that is shutting down, the thread is told to exit and aborts the process instead: in 6 of 15
    tries with an all_gather_object before the end (torch 2.13, `ProcessGroupGloo::runLoop`).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

"""Two processes that form one process group, for scenarios on real ZeRO-3 ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 560  # a minute at most on two idle cores


def run_ranks(script: str, out_dir: Path) -> None:
    """Run `python SCRIPT OUT_DIR` as two ranks, one thread each, to their end. Fails with the ends of both logs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    logs = [out_dir / f"rank{rank}.log" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), str(out_dir)],
            env=environment | {"RANK": str(rank)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=TIMEOUT_S) for process in processes]
    except subprocess.TimeoutExpired:
        codes = []
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)

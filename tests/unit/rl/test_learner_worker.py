"""A learner worker holds the port at which the ranks meet."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from rl.workers import LearnerWorker


def test_the_port_of_the_process_group_is_held_from_the_moment_it_is_told() -> None:
    worker = LearnerWorker(rank=0, world_size=2)
    address, port = worker.meet()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
    store.set("key", "value")
    assert store.get("key") == b"value"

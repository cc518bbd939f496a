"""How much memory a local cluster's object store asks for: Ray refuses more than there is."""

import pytest

from launch.cluster import _object_store_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "shared_memory", "expected"),
    [
        (4 * GIB, 2 * GIB, GIB // 2),  # a small machine: the least that rollouts need
        (64 * GIB, 32 * GIB, 4 * GIB),
        (512 * GIB, 256 * GIB, 8 * GIB),
        (256 * GIB, 64 << 20, GIB // 2),  # a container with Docker's 64 MiB: on disk, and little of it
        (256 * GIB, 5 * GIB, int(4.5 * GIB)),
    ],
)
def test_the_object_store_fits(memory, shared_memory, expected):
    assert _object_store_bytes(memory, shared_memory) == expected

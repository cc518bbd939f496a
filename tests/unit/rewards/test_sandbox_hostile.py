"""The catalogue of hostile programs against the whole path, with honest programs as their neighbours."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewards.api import RewardInput, RewardOutput
from rewards.code import CodeReward
from rewards.sandbox.api import Limits, Program, RunResult, SandboxService, Task
from rewards.sandbox.inside.zygote import NOBODY
from rewards.sandbox.local import LocalSandbox
from rewards.sandbox.process import Zygote

DATA = Path(__file__).parents[2] / "data"
SECRET = "MARKER-SECRET-6f1c"
CASES = ((1, 2, 3), (3, 4, 7), (20, 22, 42))
GROUND_TRUTHS = {
    "stdin": {"inputs": [f"{a} {b}\n" for a, b, _ in CASES], "outputs": [f"{c}\n" for _, _, c in CASES]},
    "call": {"fn_name": "add", "inputs": [[a, b] for a, b, _ in CASES], "outputs": [c for _, _, c in CASES]},
    "assert": [*(f"assert add({a}, {b}) == {c}" for a, b, c in CASES), "assert abs(add(5, 6) - 11) < 1e-9"],
}
HOSTILE_LIMITS = {
    "cpu_s": 1, "wall_s": 2, "memory_bytes": 128 << 20, "disk_bytes": 8 << 20, "file_bytes": 4 << 20,
    "output_bytes": 1 << 20, "processes": 8,
}  # fmt: skip


class Recorder:
    """A service that keeps what came out of each program."""

    def __init__(self, service: SandboxService) -> None:
        self.service = service
        self.results: dict[str, list[RunResult]] = {}

    def run(self, program: Program, tasks: Iterable[Task], limits: Limits) -> Iterator[RunResult]:
        for result in self.service.run(program, tasks, limits):
            self.results.setdefault(program.source, []).append(result)
            yield result

    def close(self) -> None:
        self.service.close()


def load(folder: str, replacements: dict[str, str]) -> list[tuple[str, str, str]]:
    """(name, form, source) of every program, once for each form that its second line names."""
    found = []
    for path in sorted((DATA / folder).glob("*.py.txt")):
        source = path.read_text()
        forms = source.splitlines()[1].removeprefix("# forms: ").split()
        for key, value in replacements.items():
            source = source.replace(f"@{key}@", value)
        found += [(path.name.removesuffix(".py.txt"), form, source) for form in forms]
    return found


def sample(form: str, source: str) -> RewardInput:
    return RewardInput("", "", f"```python\n{source}```\n", GROUND_TRUTHS[form])


def listing(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def descendants(pid: int) -> list[int]:
    children = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Things on the host that no program may reach, by the catalogue's placeholders."""
    canary = tmp_path / "canary"
    canary.write_text(SECRET)
    canary.chmod(0o666)
    tmp_path.chmod(0o777)
    name = f"fledge-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
        abstract.bind("\0" + name)
        yield {
            "CANARY": str(canary),
            "PORT": str(tcp.getsockname()[1]),
            "ABSTRACT": name,
            "PARENT": str(os.getpid()),
            "MINUSES": "-" * 200_000,
            "OPEN": "(" * 5000,
            "CLOSE": ")" * 5000,
        }
        for listener in (tcp, abstract):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept() if listener is tcp else listener.recv(1)
    assert canary.read_text() == SECRET


def test_no_hostile_program_scores_and_every_honest_one_does(host: dict[str, str], monkeypatch) -> None:
    monkeypatch.setenv("MARKER_ENVIRONMENT", SECRET)
    hostile, honest = load("hostile", host), load("honest", {})
    assert len({name for name, _, _ in hostile}) >= 60
    descriptors = len(listing("/proc/self/fd"))
    guard = CodeReward(score="share", limits=HOSTILE_LIMITS)
    neighbour = CodeReward(limits={"cpu_s": 1.5, "wall_s": 60, "memory_bytes": 256 << 20}, total_s=300)
    guard._service = recorder = Recorder(guard._service)  # type: ignore[assignment]
    services: list[LocalSandbox] = [recorder.service, neighbour._service]  # type: ignore[attr-defined, list-item]
    zygotes: list[Zygote] = [service._zygote for service in services]  # type: ignore[misc]
    with ThreadPoolExecutor(1) as pool:
        scored = pool.submit(lambda: list(neighbour.score_batch([sample(form, source) for _, form, source in honest])))
        outputs = list(guard.score_batch([sample(form, source) for _, form, source in hostile]))
        neighbours = scored.result()
    failed = [(n, f, o) for (n, f, _), o in zip(honest, neighbours, strict=True) if getattr(o, "reward", o) != 1.0]
    assert not failed, failed
    scoring = [(n, f, o) for (n, f, _), o in zip(hostile, outputs, strict=True) if getattr(o, "reward", o) != 0.0]
    assert not scoring, scoring
    leaks = [
        (source.splitlines()[0], result.stdout[:500])
        for source, results in recorder.results.items()
        for result in results
        if b"MARKER" in result.stdout or "MARKER-SECRET" in result.stderr
    ]
    assert not leaks, leaks
    for service, zygote in zip(services, zygotes, strict=True):
        idle = [box for boxes in service._idle.values() for box in boxes]  # nothing in them but their first process
        assert len(descendants(zygote.process.pid)) == 1 + len(idle), "a box or a program is left"
        assert not any(box.has_ended() for box in idle)
    for reward in (guard, neighbour):
        reward.close()
    assert all(zygote.process.returncode == 0 for zygote in zygotes)
    assert len(listing("/proc/self/fd")) == descriptors
    places = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    left = [path for place in places for path in place.iterdir() if path.lstat().st_uid == NOBODY]
    assert not left or os.geteuid() != 0, left


def test_every_result_of_the_catalogue_is_an_output_not_an_error(host: dict[str, str]) -> None:
    reward = CodeReward(limits=HOSTILE_LIMITS)
    try:
        for name in ("gc_sockets", "flood_stdout", "processes_kill", "exit_clean"):
            source = next(s for n, _, s in load("hostile", host) if n == name)
            (output,) = reward.score_batch([sample("stdin", source)])
            assert isinstance(output, RewardOutput), (name, output)
    finally:
        reward.close()

"""The sandbox service: results, limits, reuse of boxes, leaving nothing behind, and refusing what it cannot do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards.api import InfrastructureError
from rewards.sandbox.api import MIB, CallTask, EvaluateTask, Limits, Program, RunResult, RunStatus, StdinTask
from rewards.sandbox.inside import plain
from rewards.sandbox.local import LocalSandbox
from rewards.sandbox.probe import probe
from rewards.sandbox.slots import Slots
from rl.errors import ConfigError

LIMITS = Limits(cpu_s=2, wall_s=60, memory_bytes=192 * MIB, disk_bytes=8 * MIB, file_bytes=4 * MIB, processes=8)
ROOT = Path(__file__).parents[3]
FOUR_TIMES_80_MIB = """
import os, time
os.fork(), os.fork()
x = bytearray(80 << 20)
x[::4096] = b'1' * len(x[::4096])
time.sleep(60)
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[LocalSandbox]:
    service = LocalSandbox()
    yield service
    service.close()


def run(
    sandbox: LocalSandbox, source: str, *tasks: object, limits: Limits = LIMITS, language="python"
) -> list[RunResult]:
    return list(sandbox.run(Program(source, language), tasks or (StdinTask(""),), limits))  # type: ignore[arg-type]


def test_every_layer_holds_here() -> None:
    report = probe()
    assert report.problem == ""
    assert all(report.layers.values()), report.layers
    assert len(report.layers) == 13
    assert report.complete


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root to become another user")
def test_every_layer_holds_for_an_ordinary_user(tmp_path: Path) -> None:
    # the interpreter may lie in root's own folder, so show it at the same place in a private mount namespace
    base = Path(sys.base_prefix)
    script = f"""
        set -e
        mkdir {tmp_path}/base && mount --bind {base} {tmp_path}/base
        case {base} in /root/*)
            mount -t tmpfs -o mode=755 none /root
            mkdir -p {base} && mount --bind {tmp_path}/base {base};;
        esac
        export TMPDIR=$(mktemp -d) && chmod 777 $TMPDIR
        exec setpriv --reuid=12345 --regid=12345 --clear-groups {sys.executable} -c '
import json, os
from rewards.sandbox.probe import probe
report = probe()
print(json.dumps([os.getuid(), report.problem, report.layers]))'
    """
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    user, problem, layers = json.loads(done.stdout)
    assert user == 12345
    assert problem == ""
    assert len(layers) == 13
    assert all(layers.values()), layers


def test_a_machine_without_namespaces_is_refused_with_the_remedy() -> None:
    # a user without a mapping may make no namespaces, as in a container whose profile forbids them
    script = """
from rewards.sandbox.inside import linux
linux.unshare(linux.CLONE_NEWUSER)  # while there is one thread
from rewards.sandbox.local import LocalSandbox
try:
    LocalSandbox()
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert done.stdout.startswith("ConfigError the code sandbox cannot isolate programs here"), (
        done.stdout + done.stderr
    )
    assert "isolation: none" in done.stdout


def test_results_carry_output_status_and_streams(sandbox: LocalSandbox) -> None:
    good, bad, failed = run(
        sandbox,
        "import sys\nx = input()\nprint('to stderr', file=sys.stderr)\nprint(int(x) + 1)\nsys.exit(int(x) == 7)",
        StdinTask("41\n"),
        StdinTask("x\n"),
        StdinTask("7\n"),
    )
    assert (good.status, good.stdout, good.stderr, good.exit_status) == (RunStatus.OK, b"42\n", "to stderr\n", 0)
    assert (bad.status, bad.exit_status) == (RunStatus.RUNTIME_ERROR, 1)
    assert "ValueError" in bad.stderr
    assert "harness" not in bad.stderr
    assert (failed.status, failed.exit_status, failed.stdout) == (RunStatus.RUNTIME_ERROR, 1, b"8\n")


def test_calls_and_evaluations_return_plain_data(sandbox: LocalSandbox) -> None:
    source = """
def f(*a): return {'sum': sum(a), 'all': a}
class Solution:
    def g(self, x: List[int]) -> int: return x[0]
"""
    call, method, missing = run(sandbox, source, CallTask("f", "[1,2]"), CallTask("g", "[[5]]"), CallTask("h", "[]"))
    assert plain.decode(call.value or b"") == {"sum": 3, "all": (1, 2)}
    assert method.value == b"5"
    assert (missing.status, missing.value) == (RunStatus.RUNTIME_ERROR, None)
    evaluated, undefined, prelude = run(
        sandbox,
        source,
        EvaluateTask("import math", ("f(1)['sum']", "math.floor(2.5)"), ("f",)),
        EvaluateTask("", ("k(1)",), ("k",)),
        EvaluateTask("", ("sqrt(4)",), ("sqrt",)),
    )
    assert evaluated.value == b"[1,2]"
    assert undefined.status is prelude.status is RunStatus.RUNTIME_ERROR


@pytest.mark.parametrize(
    ("source", "change", "status"),
    [
        ("while True: pass", {"cpu_s": 1}, RunStatus.TIME_LIMIT),
        ("import time; time.sleep(60)", {"wall_s": 0.5}, RunStatus.TIME_LIMIT),
        ("print('x' * 2_000_000)", {"output_bytes": MIB}, RunStatus.OUTPUT_LIMIT),
        ("x = bytearray(300 << 20)", {}, RunStatus.RUNTIME_ERROR),
        ("open('f', 'wb').write(bytes(5 << 20))", {}, RunStatus.RUNTIME_ERROR),
        (FOUR_TIMES_80_MIB, {"processes": 17}, RunStatus.MEMORY_LIMIT),
    ],
)  # fmt: skip
def test_limits_end_programs(sandbox: LocalSandbox, source: str, change: dict[str, float], status: RunStatus) -> None:
    (result,) = run(sandbox, source, limits=replace(LIMITS, **change))  # type: ignore[arg-type]
    assert result.status is status, result


LOOK = "import os\nprint(sorted(os.listdir('.')), os.getpid())\n"


@pytest.mark.parametrize(
    "touch",
    [
        "open('f', 'w')",
        "open('f', 'w').close(); os.remove('f')",
        "os.chmod('.', 0o755)",
        "if os.fork() == 0:\n    os.setsid()\n    __import__('time').sleep(60)\n",
    ],
)
def test_a_box_serves_on_only_while_it_is_as_good_as_new(tmp_path: Path, touch: str) -> None:
    sandbox = LocalSandbox(slots=1, slots_folder=tmp_path)
    seen = [
        result.stdout.decode().strip()
        for program in (LOOK, LOOK, LOOK + touch, LOOK)
        for result in run(sandbox, program, StdinTask(""), StdinTask(""))
    ]
    sandbox.close()
    assert seen == ["[] 2", "[] 3", "[] 4", "[] 5", "[] 6", "[] 2", "[] 2", "[] 3"]


HOARD = """
import array, os, socket
left, right = socket.socketpair()
nameless = os.open(".", os.O_TMPFILE | os.O_RDWR)
try:
    while True:
        os.write(nameless, bytes(1 << 20))
except OSError:
    pass
for end in (left, right):
    message = array.array("i", [nameless, left.fileno(), right.fileno()])
    end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, message)])
"""
LOOK_BACK = """
import sys
frame, seen = sys._getframe(), []
while frame is not None:
    seen += [name for name in ("status", "usage", "answer") if name in frame.f_locals]
    frame = frame.f_back
print(seen)
"""


def test_a_file_that_outlives_its_processes_ends_the_box(tmp_path: Path) -> None:
    sandbox = LocalSandbox(slots=1, slots_folder=tmp_path)
    limits = replace(LIMITS, file_bytes=LIMITS.disk_bytes)
    (hoard,) = run(sandbox, HOARD, limits=limits)
    assert hoard.status is RunStatus.OK, hoard.stderr
    (after,) = run(sandbox, LOOK + "open('f', 'wb').write(bytes(4 << 20))", limits=limits)
    assert (after.status, after.stdout) == (RunStatus.OK, b"[] 2\n"), after.stderr
    sandbox.close()


def test_no_program_sees_how_an_earlier_one_ended(tmp_path: Path) -> None:
    sandbox = LocalSandbox(slots=1, slots_folder=tmp_path)
    run(sandbox, "raise SystemExit(77)")
    (second,) = run(sandbox, LOOK_BACK)
    assert second.stdout == b"[]\n", second.stderr
    sandbox.close()


SCAN = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.sbrk.restype = ctypes.c_void_p
read_end, write_end = os.pipe()
page, found = 4096, set()
around = [libc.sbrk(0) or 0, id(object()), id("x" * 5000)]
for address in {a // page + k for a in around for k in range(-4096, 1024)}:
    if libc.write(write_end, ctypes.c_void_p(address * page), page) == page:  # fails where nothing is; does not crash
        text = os.read(read_end, page)
        found |= {name for name in (b"ONE", b"TWO") if b"#secret-" + name in text}
print(sorted(found))
"""


def test_no_program_finds_an_earlier_one_in_its_memory(tmp_path: Path) -> None:
    sandbox = LocalSandbox(slots=1, slots_folder=tmp_path)
    run(sandbox, "#secret-ONE" * 500, StdinTask(""))
    (second,) = run(sandbox, SCAN + "#secret-TWO" * 500)
    sandbox.close()
    assert second.stdout == b"[b'TWO']\n", second.stderr


def test_a_box_serves_a_hundred_programs_at_most_and_ends_by_itself_without_harm(tmp_path: Path) -> None:
    sandbox = LocalSandbox(slots=1, slots_folder=tmp_path)
    pids = [int(run(sandbox, f"import os\nprint(os.getpid())#{n}")[0].stdout) for n in range(102)]
    assert pids == [*range(2, 102), 2, 3]
    ((box,),) = sandbox._idle.values()
    signal.pidfd_send_signal(box._handle, signal.SIGKILL)
    assert run(sandbox, LOOK)[0].stdout == b"[] 2\n"
    sandbox.close()


def test_packages_are_shown_by_name_only(tmp_path: Path) -> None:
    sandbox = LocalSandbox(slots=1, packages=["numpy"], slots_folder=tmp_path)
    limits = replace(LIMITS, memory_bytes=512 * MIB)
    (shown,) = run(sandbox, "import numpy\nprint(numpy.arange(5).sum())", limits=limits)
    (hidden,) = run(sandbox, "import pydantic", limits=limits)
    sandbox.close()
    assert shown.stdout == b"10\n", shown
    assert "No module named 'pydantic'" in hidden.stderr
    for options, message in (
        ({"packages": ["no_such_package"]}, "'no_such_package', which is not installed"),
        ({"packages": ["numpy"], "isolation": "none"}, "only with `isolation: full`"),
    ):
        with pytest.raises(ConfigError, match=message):
            LocalSandbox(slots_folder=tmp_path, **options)  # type: ignore[arg-type]


def test_stopping_early_frees_the_slot_and_the_box(tmp_path: Path) -> None:
    sandbox = LocalSandbox(slots=1, slots_folder=tmp_path)
    results = sandbox.run(Program("print(1)"), [StdinTask("")] * 100, LIMITS)
    assert next(results).stdout == b"1\n"
    results.close()  # type: ignore[attr-defined]
    assert run(sandbox, "print(2)")[0].stdout == b"2\n"
    sandbox.close()
    with pytest.raises(InfrastructureError, match="closed"):
        run(sandbox, "print(3)")


def test_a_dead_zygote_is_replaced(tmp_path: Path) -> None:
    sandbox = LocalSandbox(slots=1, slots_folder=tmp_path)
    os.kill(sandbox.zygote_pid, signal.SIGKILL)
    while sandbox._zygote.process.poll() is None:  # type: ignore[union-attr]
        time.sleep(0.01)
    assert run(sandbox, "print(2)")[0].stdout == b"2\n"
    sandbox.close()


def test_everything_ends_with_a_killed_service(tmp_path: Path) -> None:
    script = f"""
import sys, threading
from pathlib import Path
from rewards.sandbox.api import *
from rewards.sandbox.local import LocalSandbox
sandbox = LocalSandbox(slots=1, slots_folder=Path({str(tmp_path)!r}))
print(sandbox.zygote_pid, flush=True)
list(sandbox.run(Program("while True: pass"), [StdinTask("")], Limits(cpu_s=50, wall_s=60)))
"""
    service = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert service.stdout is not None
    zygote = Path(f"/proc/{service.stdout.readline().strip()}")
    deadline = time.monotonic() + 60
    while len(list(zygote.glob("task/*/children"))) == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    service.kill()
    service.wait()
    service.stdout.close()
    while zygote.exists() and "Z" not in (zygote / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() < deadline


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_cpp_programs_take_the_same_path(sandbox: LocalSandbox) -> None:
    source = (
        '#include <cstdio>\nint main() { int a, b; if (scanf("%d %d", &a, &b) != 2) return 3; printf("%d\\n", a + b); }'
    )
    good, bad = run(sandbox, source, StdinTask("1 2"), StdinTask("x"), language="cpp")
    assert (good.status, good.stdout) == (RunStatus.OK, b"3\n")
    assert (bad.status, bad.exit_status) == (RunStatus.RUNTIME_ERROR, 3)
    (broken,) = run(sandbox, "int main() {", StdinTask(""), StdinTask(""), language="cpp")
    assert broken.status is RunStatus.COMPILE_ERROR
    assert "error" in broken.stderr
    (reads,) = run(sandbox, '#include "/etc/passwd"\nint main() {}', StdinTask(""), language="cpp")
    assert reads.status is RunStatus.COMPILE_ERROR
    with pytest.raises(ConfigError, match="needs a Python program"):
        run(sandbox, source, CallTask("f", "[]"), language="cpp")


def test_unisolated_runs_only_on_request_and_still_sweeps(tmp_path: Path) -> None:
    sandbox = LocalSandbox("none", slots=1, slots_folder=tmp_path)
    daemon = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(60)
    os._exit(0)
print(os.getcwd())
"""
    first, second = run(sandbox, daemon, StdinTask(""), StdinTask(""))
    assert first.stdout != second.stdout
    assert not Path(first.stdout.decode().strip()).exists()
    (slept,) = run(sandbox, "import time; time.sleep(60)", limits=Limits(wall_s=0.5))
    assert slept.status is RunStatus.TIME_LIMIT
    sandbox.close()


def test_slots_bind_across_services(tmp_path: Path) -> None:
    first, second = Slots(2, tmp_path), Slots(2, tmp_path)
    running, most = [0], [0]

    def work(slots: Slots) -> None:
        with slots.take():
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.005)
            running[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [first, second] * 20))
    assert most[0] == 2


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.fractions()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner)
    | st.sets(st.integers() | st.text()) | st.frozensets(st.tuples(st.integers(), st.text())),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
@settings(max_examples=60, deadline=None)
def test_plain_data_survives_the_encoding(value: object) -> None:
    decoded = plain.decode(plain.encode(value))
    assert decoded == value
    assert type(decoded) is type(value)


def test_what_is_not_plain_is_opaque_or_refused() -> None:
    assert plain.encode([object(), len]) == '[{"o":"object"},{"o":"builtin_function_or_method"}]'
    opaque = plain.decode('{"o":"object"}')
    assert opaque != opaque  # noqa: PLR0124
    nested: list[object] = []
    for _ in range(200):
        nested = [nested]
    with pytest.raises(plain.NotPlainError):
        plain.encode(nested)
    with pytest.raises(plain.NotPlainError):
        plain.decode('{"zz": []}')


@given(st.text(max_size=200) | st.from_regex(r"(?:[a-z]{1,3}[ =+(){}\[\]:.\n]){1,30}", fullmatch=True))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_programs_end_in_a_result(sandbox: LocalSandbox, source: str) -> None:
    limits = Limits(cpu_s=1, wall_s=20, memory_bytes=64 * MIB, output_bytes=MIB, file_bytes=2 * MIB, processes=4)
    results = run(sandbox, source, StdinTask(source), CallTask("f", "[]"), limits=limits)
    assert [result.status in RunStatus for result in results] == [True, True]

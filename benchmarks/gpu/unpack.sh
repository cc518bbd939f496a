# Sourced on the machine that lacks a package index: `. benchmarks/gpu/unpack.sh FOLDER [SITE]` joins the pieces that
# pack.py left in FOLDER, and puts them before what the machine's own Python holds.
pieces=$1 site=${2:-/tmp/fledge-site}
[ -d "$site" ] || { mkdir -p "$site" && cat "$pieces"/site.tar.xz.* | tar -C "$site" -xJ; }
if ls "$pieces"/nccl.tar.xz.* >/dev/null 2>&1; then
    [ -f "$site/libnccl.so.2" ] || cat "$pieces"/nccl.tar.xz.* | tar -C "$site" -xJ
    export VLLM_NCCL_SO_PATH=$site/libnccl.so.2
fi
export PYTHONPATH=$site:$PWD VLLM_USE_FLASHINFER_SAMPLER=0 # FlashInfer was not packed

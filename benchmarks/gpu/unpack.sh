# Sourced on the machine that lacks a package index: `. benchmarks/gpu/unpack.sh FOLDER [SITE]` joins the pieces that
# pack.py left in FOLDER, and puts them before what the machine's own Python holds.
pieces=$1 site=${2:-/tmp/fledge-site}
if [ ! -d "$site" ]; then
    rm -rf "$site.part" && mkdir -p "$site.part" || return 1
    for what in site nccl; do
        cat "$pieces/$what".tar.xz.* | tar -C "$site.part" -xJ || return 1
    done
    mv "$site.part" "$site" || return 1
fi
export VLLM_NCCL_SO_PATH=$site/libnccl.so.2
export PYTHONPATH=$site:$PWD VLLM_USE_FLASHINFER_SAMPLER=0 # FlashInfer was not packed

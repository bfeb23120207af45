#!/usr/bin/env bash
# Twelve minutes on a borrowed GPU: `bash benchmarks/gpu.sh [OUT]` from the root of the repository.
# Every part has its own limit, so one that fails or hangs costs the others nothing; they add up to
# 12 minutes at most. The exit code is the number of parts that failed. Logs lie in OUT (gpu).
set -uo pipefail
OUT=${1:-gpu} PYTHON=${PYTHON:-python} failed=0
export PYTHONPATH=${PYTHONPATH:-$PWD}
mkdir -p "$OUT"
part() { # name, seconds, command
  local name=$1 limit=$2 code; shift 2
  timeout "$limit" "$@" > "$OUT/$name.log" 2>&1; code=$?
  echo "== $name: exit $code (124: over $limit s): $*"; tail -n 12 "$OUT/$name.log"
  [ "$code" -eq 0 ] || failed=$((failed + 1))
}
WEIGHTS="import sys, timm; from safetensors.torch import save_file; save_file(timm.create_model(sys.argv[1]).state_dict(), sys.argv[2])"
part tests 90 "$PYTHON" -m pytest -q -m gpu tests
part train_step 140 "$PYTHON" benchmarks/train_step.py --device cuda --rounds 3   # step, MFU
part compile 140 "$PYTHON" benchmarks/train_step.py --device cuda --rounds 3 --compile
part omics 110 "$PYTHON" benchmarks/omics.py --sizes 1000 10000 --rounds 3 --points 0   # cells/s
part contrast 90 "$PYTHON" benchmarks/contrast.py --sizes 4096 16384 65536   # tiles
part stores 60 bash -c "'$PYTHON' -m hibio.cli simulate --out '$OUT/cohort' --slides 2 --spots 1000 && '$PYTHON' -m hibio.cli prepare '$OUT/cohort/manifest.csv' --out '$OUT/stores'"
part weights 20 "$PYTHON" -c "$WEIGHTS" vit_base_patch16_224 "$OUT/vit.safetensors"
part features 70 "$PYTHON" -m hibio.cli features "$OUT/stores" --encoder vit_base_patch16_224 --weights "$OUT/vit.safetensors" --device cuda --batch 256
exit "$failed"

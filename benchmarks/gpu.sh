#!/usr/bin/env bash
# Twelve minutes on a borrowed GPU: `bash benchmarks/gpu.sh [OUT]` from the root of the repository.
# Every part has its own limit, so one that fails or hangs costs the others nothing; they add up to
# 12 minutes at most. The exit code is the number of parts that failed. Logs lie in OUT (gpu).
# `--dry [OUT]` tries every part on a CPU with the smallest sizes, before the day.
set -uo pipefail
DRY="" slower=1; [ "${1:-}" = --dry ] && { DRY=1 slower=6; shift; }
OUT=${1:-gpu} PYTHON=${PYTHON:-python} failed=0
export PYTHONPATH=${PYTHONPATH:-$PWD}
mkdir -p "$OUT"
part() { # name, seconds, command
  local name=$1 limit=$(($2 * slower)) code; shift 2
  timeout "$limit" "$@" > "$OUT/$name.log" 2>&1; code=$?
  echo "== $name: exit $code (124: over $limit s): $*"; tail -n 12 "$OUT/$name.log"
  [ "$code" -eq 0 ] || failed=$((failed + 1))
}
step="--device cuda --rounds 3" omics="--sizes 1000 10000 --rounds 3 --points 0"
contrast="--sizes 4096 16384 65536" spots=1000 encoder=vit_base_patch16_224 device=cuda
if [ "$DRY" ]; then
  step="--rounds 1 --slides 2 --spots 40 --px 32 --batch 16 --steps 1 --warm 1 --genes 16"
  omics="--sizes 64 --cells 16 --rounds 1 --points 0" contrast="--sizes 256 --rounds 1"
  spots=60 encoder=test_vit device=cpu
fi
WEIGHTS="import sys; from hibio.backbones.networks import ensure_torchvision; ensure_torchvision(); import timm; from safetensors.torch import save_file; save_file(timm.create_model(sys.argv[1]).state_dict(), sys.argv[2])"
# shellcheck disable=SC2086  # the settings are words
{
  part tests 90 "$PYTHON" -m pytest -q -m gpu $(grep -rl --include=test_*.py "mark.gpu" tests)
  part train_step 140 "$PYTHON" benchmarks/train_step.py $step   # step, MFU
  part compile 140 "$PYTHON" benchmarks/train_step.py $step --compile
  part omics 110 "$PYTHON" benchmarks/omics.py $omics   # cells/s
  part contrast 90 "$PYTHON" benchmarks/contrast.py $contrast   # tiles
  part stores 60 bash -c "'$PYTHON' -m hibio.cli simulate --out '$OUT/cohort' --slides 2 --patients 2 --spots $spots && '$PYTHON' -m hibio.cli prepare '$OUT/cohort/manifest.csv' --out '$OUT/stores'"
  part weights 20 "$PYTHON" -c "$WEIGHTS" $encoder "$OUT/vit.safetensors"
  part features 70 "$PYTHON" -m hibio.cli features "$OUT/stores" --encoder $encoder --weights "$OUT/vit.safetensors" --device $device --batch 256
}
exit "$failed"

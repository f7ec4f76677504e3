#!/usr/bin/env bash
# On a machine with a GPU, in the project's root, after prepare.sh: parity, speed and a training run, within ten minutes.
# Each part has a time limit and a log under $OUT of its own, so that the failure of one hides no other.
set -u
OUT=${OUT:-out}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=/tmp/site:$PWD
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
part() { # name seconds command...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  echo "rc $? after $((SECONDS - began)) s"
  tail -n 25 "$OUT/$name.log"
}
part device 30 python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.version.cuda)"
part parity 120 python3 -m pytest -q -x -p no:cacheprovider -m cuda tests
part speed 200 python3 benchmarks gpu --cases A B --precision tf32 --out "$OUT/gpu"
part train 150 python3 -m metawrap train --data omniglot --data-root .dev/omniglot-py.zip --ways 20 --shots 1 --device cuda \
  --set engine=batched --batch 8 --iterations 500 --epochs 100 --out /tmp/20way
# The log, and the newest checkpoint for the next ten minutes.
cp /tmp/20way/log.jsonl /tmp/20way/run.json "$(ls -t /tmp/20way/checkpoints/* | head -n 1)" "$OUT/" 2>/dev/null || true

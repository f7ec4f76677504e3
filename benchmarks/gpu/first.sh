#!/usr/bin/env bash
# What a GPU shows first, most important first, within ten minutes: parity, speed, and 20-way 1-shot for the time that is
# left. Each part has a time limit and a log under $OUT, so that the failure of one hides no other. In the project's root:
#   bash benchmarks/gpu/first.sh                        with CUDA; `make gpu` does it
#   DEVICE=cpu SMALL=1 bash benchmarks/gpu/first.sh     a try of every part at a tiny size: no figures to quote
# Forms of "batched" that the engine lacks are left out: see `python benchmarks gpu --help`.
#
# PYTHON has torch; the wheels that prepare.sh has laid into .whl are put on its path. OMNIGLOT is the zip in torchvision's
# layout. RUN is the folder of the 20-way run, which goes on where it stopped; it is packed into $OUT/20way.tar.gz, and
# unpacked from $RUN.tar.gz where that lies there.
set -u
OUT=${OUT:-runs/gpu} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3} RUN=${RUN:-.dev/20way}
OMNIGLOT=${OMNIGLOT:-.dev/omniglot-py.zip}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
if ls .whl/*.whl >/dev/null 2>&1; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
  PYTHONPATH=$site:$PWD
fi
failed=0
part() { # name seconds command...
  local name=$1 limit=$2 began=$SECONDS rc
  shift 2
  echo "== $name, at most $limit s"
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  rc=$?
  tail -n 40 "$OUT/$name.log"
  echo "== $name: exit code $rc after $((SECONDS - began)) s"
  # The training run ends when the time is up.
  [ "$rc" = 0 ] || { [ "$name" = train ] && [ "$rc" = 124 ]; } || failed=1
}
cases=(--cases A B --repeats 5)
# Epochs short enough that a checkpoint comes within a minute or two; the multi-step loss lasts as long as in the paper.
training=(--batch 8 --iterations 250 --epochs 200 --validation-tasks 40 --set engine=batched --set msl_epochs=20)
if [ -n "${SMALL:-}" ]; then
  cases=(--cases A B --repeats 1 --small)
  training=(--batch 2 --iterations 2 --epochs 2 --filters 2 --validation-tasks 2 --test-tasks 2 --set engine=batched)
fi
part device 30 "$PYTHON" -c "import torch; print(torch.__version__, torch.version.cuda, '$DEVICE' == 'cpu' or torch.cuda.get_device_name())"
# Only the files with such tests: others import what may not be installed.
part parity 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda $(grep -rl "pytest.mark.cuda" tests)
part speed 240 "$PYTHON" benchmarks gpu --device "$DEVICE" "${cases[@]}" --precision tf32 bf16 --out "$OUT"
[ ! -d "$RUN" ] && [ -f "$RUN.tar.gz" ] && mkdir -p "$RUN" && tar -xzf "$RUN.tar.gz" -C "$RUN"
if [ -d "$RUN" ]; then
  training=()  # A run that goes on keeps its settings.
elif grep -q '"kind": "agreement".*"metawrap batched graphs".*"agrees": true' "$OUT/gpu.jsonl" 2>/dev/null; then
  training+=(--set execution.cuda_graphs=true)
fi
[ -d "$RUN" ] || training+=(--data omniglot --data-root "$OMNIGLOT" --ways 20 --shots 1)
part train $((585 - SECONDS)) "$PYTHON" -m metawrap train "${training[@]}" --device "$DEVICE" --out "$RUN" --resume
tar -czf "$OUT/20way.tar.gz" -C "$RUN" . || failed=1
exit $failed

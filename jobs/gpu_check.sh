#!/usr/bin/env bash
# Everything there is to check and measure on a GPU, on a machine that has torch >= 2.11, triton >= 3.6,
# transformers >= 5.17 and maybe nothing else, no network either:
#
#   jobs/gpu_check.sh                      # all steps: tests load kernels tune annotate synthesise long offload guided
#   jobs/gpu_check.sh tests annotate       # some of them
#
# What Python packages the machine lacks is installed from wheels/, made where there is a network by
#   pip wheel --no-deps -w wheels hydra-core omegaconf antlr4-python3-runtime==4.9.3 datasets ...
# (those of compiled packages, such as pyarrow, for that machine's Python)
#
#   OUT     where JSON results and logs go (benchmarks/results)
#   LIMIT   seconds that a step may take (600)
#   ROWS    of annotate and synthesise, `long` has a tenth (2000: with peers it fits the limit; the full size is 4000)
#   PEERS   benchmark.peers, such as [vllm] or [] (null: all that are installed)
#   PYTHON  (python3)
#
# Without a GPU it tries its own code path: tiny shapes, the kernels under Triton's interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-benchmarks/results} LIMIT=${LIMIT:-600} ROWS=${ROWS:-2000} PEERS=${PEERS:-null} PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

# module:package; what is useful is used where it is there
NEEDED="numpy:numpy pyarrow:pyarrow hydra:hydra-core antlr4:antlr4-python3-runtime omegaconf:omegaconf datasets:datasets
  yaml:pyyaml jinja2:jinja2 fsspec:fsspec zstandard:zstandard psutil:psutil tqdm:tqdm safetensors:safetensors
  pytest:pytest hypothesis:hypothesis"
USEFUL="sentencepiece:sentencepiece mistral_common:mistral-common matplotlib:matplotlib llguidance:llguidance"

lacks() { ! "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

for entry in $NEEDED $USEFUL; do
  if lacks "${entry%%:*}" && [ -d wheels ]; then
    PIP_BREAK_SYSTEM_PACKAGES=1 "$PYTHON" -m pip install --quiet --no-index --find-links wheels "${entry#*:}"
  fi
done
missing=
for entry in $NEEDED; do
  if lacks "${entry%%:*}"; then missing="$missing ${entry#*:}"; fi
done
if [ -n "$missing" ]; then
  echo "gpu_check: not installed, and no wheels of them in wheels/:$missing" >&2
  exit 1
fi
"$PYTHON" - <<'PY' || exit 1
import sys, torch, transformers, triton
for module, least in ((torch, (2, 11)), (triton, (3, 6)), (transformers, (5, 17))):
    if tuple(int(part) for part in module.__version__.split(".")[:2]) < least:
        sys.exit(f"gpu_check: {module.__name__} {module.__version__} is older than {'.'.join(map(str, least))}")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: tiny shapes on the CPU"
print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}")
PY

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  SIZE=("benchmark.rows=$ROWS") OFFLOAD=(benchmark.rows=400) KERNELS=() TUNE=(tune.seconds=$((LIMIT - 90)))
  LOAD=(--device cuda --gb 20 --readers 1 2 4 8 --turns 1) GUIDED=(--repeats 3)
else
  export TRITON_INTERPRET=1
  SIZE=(benchmark.shape=tiny benchmark.rows=4) OFFLOAD=(benchmark.shape=tiny benchmark.rows=4)
  KERNELS=(benchmark.shape=tiny 'benchmark.only=[sampling,linear]' 'benchmark.tokens=[3]')
  TUNE=(tune.shape=tiny 'tune.formats=[int4]' 'tune.rows=[4]' tune.seconds=2 "tune.dir=$OUT/tiles")
  LOAD=(--gb 0.1 --turns 1) GUIDED=(--rows 4 --repeats 1)
fi

RESULTS= FAILED=0
# SIGINT, so that what runs out of time still says how far it came.
step() {
  local name=$1 started=$SECONDS rc
  shift
  echo "== $name: $*"
  timeout --signal=INT --kill-after=30 "$LIMIT" "$@" 2>&1 | tee "$OUT/gpu-check-$name.log"
  rc=${PIPESTATUS[0]}
  echo "== $name: exit code $rc after $((SECONDS - started)) s"
  RESULTS="$RESULTS${RESULTS:+, }\"$name\": {\"exit_code\": $rc, \"seconds\": $((SECONDS - started))}"
  [ "$rc" -eq 0 ] || FAILED=1
}

for name in "${@:-all}"; do
  for each in $([ "$name" = all ] && echo tests load kernels tune annotate synthesise long offload guided || echo "$name"); do
    case $each in
      # Compilation for GPUs that are not there needs no GPU: it is part of the ordinary tests.
      tests) step tests "$PYTHON" -m pytest -q -m "gpu and not slow" --ignore tests/kernels/test_compile.py \
        --durations 10 --continue-on-collection-errors tests ;;
      load) step load env "PYTHONPATH=$PWD/benchmarks:$PYTHONPATH" "$PYTHON" benchmarks/bench_load.py --folder "$OUT" "${LOAD[@]}" ;;
      kernels) step kernels "$PYTHON" -m batchmix benchmark kernels "benchmark.dir=$OUT" ${KERNELS[@]+"${KERNELS[@]}"} ;;
      tune)
        step tune "$PYTHON" -m batchmix tune "${TUNE[@]}"
        if [ -d kernels/configs ]; then cp -r kernels/configs "$OUT/"; fi ;;
      annotate | synthesise | long)
        step "$each" "$PYTHON" -m batchmix benchmark throughput "benchmark.only=[$each]" "benchmark.dir=$OUT" \
          "benchmark.peers=$PEERS" benchmark.peer_seconds=60 "${SIZE[@]}" ;;
      offload) # a short peer: its rate is that of one batch
        step offload "$PYTHON" -m batchmix benchmark offload "benchmark.dir=$OUT" benchmark.peer_seconds=30 "${OFFLOAD[@]}" ;;
      guided) step guided env "PYTHONPATH=$PWD/benchmarks:$PYTHONPATH" "$PYTHON" benchmarks/bench_guided.py --save --folder "$OUT" \
        "${GUIDED[@]}" ;;
      *)
        echo "gpu_check: $each: no such step; the steps are tests, load, kernels, tune, annotate, synthesise, long, offload, guided" >&2
        exit 2 ;;
    esac
  done
done
echo "{$RESULTS}" >"$OUT/$(date +%F)-gpu-check.json"
echo "results are in $OUT"
exit "$FAILED"

#!/usr/bin/env bash
# What there is to check and measure on a GPU that is there for 15 minutes, on a machine that has torch >= 2.11,
# triton >= 3.6, transformers >= 5.17 and maybe nothing else, no network either:
#
#   jobs/gpu_check.sh first           # smoke synthesise annotate tests tune, in 470 s
#   jobs/gpu_check.sh second          # peers long offload guided fp8 steady kernels load, in 370 s
#   jobs/gpu_check.sh tests annotate  # some of them, in 840 s; nothing named: first and second
#
# Whole runs come first: they are what users get and what README.md says, and they use every part, so a fault shows. The
# tests that come next say which part it is. Tiles are searched after that, since tables of some cards are there already;
# then other engines on the same work. What comes last is done where time is left. A step has a limit of its own, cut to
# what is left, and is not started where less than it needs is left.
#
# What Python packages the machine lacks is installed from wheels/, made where there is a network by
#   pip wheel --no-deps -w wheels hydra-core omegaconf antlr4-python3-runtime==4.9.3 datasets ...
# (those of compiled packages, such as pyarrow, for that machine's Python; pytest-xdist runs the tests in parallel)
#
# The step `peers` runs vLLM, where the machine has it or wheels (*.whl) and parts of unpacked ones (*.tar.xz) of it and of
# all that it needs are in peers/. Each call unpacks what is there into build/peers, so it may come in several calls:
#   jobs/gpu_check.sh unpack          # with peers/call1 there; then `first` with peers/call2, `second` with peers/call3
#
#   OUT     where JSON results and the log go (benchmarks/results)
#   PACK    a .tgz file that has all of OUT, written anew after each step, where not many files can be brought back
#   TOTAL   seconds in all
#   ROWS    of annotate and synthesise, `long` has a tenth (800); `steady` is synthesise with three times as many
#   PEERS_PACKED (peers)  PEERS_PATH (build/peers)  PYTHON (python3)
#
# Without a GPU it tries its own code path: tiny shapes, the kernels under Triton's interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

FIRST="smoke synthesise annotate tests tune" SECOND="peers long offload guided fp8 steady kernels load"
case "${*:-all}" in
  all) PART=all STEPS="$FIRST $SECOND" ALLOWED=840 ;;
  first) PART=first STEPS=$FIRST ALLOWED=470 ;;
  second) PART=second STEPS=$SECOND ALLOWED=370 ;;
  *) PART=some STEPS=$* ALLOWED=840 ;;
esac
for name in $STEPS; do
  case " unpack $FIRST $SECOND " in
    *" $name "*) ;;
    *)
      echo "gpu_check: $name: no such step; the steps are unpack $FIRST $SECOND, the parts first and second" >&2
      exit 2 ;;
  esac
done

OUT=${OUT:-benchmarks/results} PACK=${PACK:-} TOTAL=${TOTAL:-$ALLOWED} ROWS=${ROWS:-800} PYTHON=${PYTHON:-python3}
PEERS_PACKED=${PEERS_PACKED:-peers} PEERS_PATH=${PEERS_PATH:-$PWD/build/peers}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/gpu-check-$PART.log SUMMARY=$OUT/$(date +%F)-gpu-check-$PART.json
: >"$LOG"

# module:package; what is useful is used where it is there
NEEDED="numpy:numpy pyarrow:pyarrow hydra:hydra-core antlr4:antlr4-python3-runtime omegaconf:omegaconf datasets:datasets
  yaml:pyyaml jinja2:jinja2 fsspec:fsspec zstandard:zstandard psutil:psutil tqdm:tqdm safetensors:safetensors
  pytest:pytest hypothesis:hypothesis"
USEFUL="xdist:pytest-xdist sentencepiece:sentencepiece mistral_common:mistral-common llguidance:llguidance"

lacking() { # which of these module:package cannot be imported, as one process finds out
  "$PYTHON" -c 'import importlib.util, sys
print(*(entry for entry in sys.argv[1:] if importlib.util.find_spec(entry.partition(":")[0]) is None))' "$@"
}

LACKING=$(lacking $NEEDED $USEFUL)
if [ -n "$LACKING" ] && [ -d wheels ]; then
  for entry in $LACKING; do
    PIP_BREAK_SYSTEM_PACKAGES=1 "$PYTHON" -m pip install --quiet --no-index --find-links wheels "${entry#*:}"
  done
  LACKING=$(lacking $NEEDED $USEFUL)
fi
missing=
for entry in $NEEDED; do
  case " $LACKING " in *" $entry "*) missing="$missing ${entry#*:}" ;; esac
done
if [ -n "$missing" ]; then
  echo "gpu_check: not installed, and no wheels of them in wheels/:$missing" >&2
  exit 1
fi
FOUND=$("$PYTHON" - <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

found = []
for package, least in (("torch", (2, 11)), ("triton", (3, 6)), ("transformers", (5, 17))):
    try:
        found.append(f"{package} {version(package)}")
    except PackageNotFoundError:
        sys.exit(f"gpu_check: {package} is not installed")
    if tuple(int(part) for part in version(package).split(".")[:2]) < least:
        sys.exit(f"gpu_check: {found[-1]} is older than {'.'.join(map(str, least))}")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: tiny shapes on the CPU"
print(f"{gpu}, {', '.join(found)}")
PY
) || exit 1
echo "$FOUND" | tee -a "$LOG"

GPU=1
case $FOUND in "no GPU"*) GPU=0 ;; esac
if [ "$GPU" -eq 1 ]; then
  SIZE=("benchmark.rows=$ROWS") STEADY=("benchmark.rows=$((3 * ROWS))") FP8=(model.quantization=fp8 model.kv_cache_dtype=fp8)
  OFFLOAD=(benchmark.layers=16 benchmark.rows=200) KERNELS=('benchmark.tokens=[256,1024,16384]')
  TUNE=('tune.formats=[bfloat16,fp8,int4]') LOAD=(--device cuda --gb 20 --readers 1 4 --turns 1) GUIDED=(--repeats 3)
else
  export TRITON_INTERPRET=1
  SIZE=(benchmark.shape=tiny benchmark.rows=4) STEADY=(benchmark.shape=tiny benchmark.rows=12) FP8=(model.quantization=fp8)
  OFFLOAD=(benchmark.shape=tiny benchmark.rows=4)
  KERNELS=(benchmark.shape=tiny 'benchmark.only=[sampling,linear]' 'benchmark.tokens=[3]')
  TUNE=(tune.shape=tiny 'tune.formats=[int4]' 'tune.rows=[4]' "tune.dir=$OUT/tiles") LOAD=(--gb 0.1 --turns 1) GUIDED=(--rows 4 --repeats 1)
fi
WORKERS=()
case " $LACKING " in *" xdist:"*) ;; *) WORKERS=(-n auto --maxprocesses 13) ;; esac

RESULTS= FAILED=0 LIMIT=0
PATIENCE=$((GPU ? 1 : 4)) # a rehearsal may run beside other work on a few cores; limits are a GPU's
record() {
  RESULTS="$RESULTS${RESULTS:+, }\"$1\": $2"
  echo "{\"total\": $TOTAL, \"seconds\": $SECONDS, \"steps\": {$RESULTS}}" >"$SUMMARY"
  if [ -n "$PACK" ]; then tar czf "$PACK.new" --exclude '*.tgz*' -C "$OUT" . && mv "$PACK.new" "$PACK"; fi
}
# begin NAME NEEDS MOST: the step's limit, unless less than it needs is left; 10 s are for ending what does not end.
begin() {
  local left=$((TOTAL - SECONDS - 10)) most=$(($3 * PATIENCE))
  LIMIT=$((left < most ? left : most))
  [ "$left" -ge "$2" ] && return
  echo "== $1: not started: it takes $2 s at least, $left are left" | tee -a "$LOG"
  record "$1" "{\"needs\": $2, \"left\": $left}"
  return 1
}
# step NAME COMMAND: SIGINT at the limit, so that what runs out of time still says how far it came.
step() {
  local name=$1 started=$SECONDS rc
  shift
  echo "== $name, $LIMIT s at most: $*" | tee -a "$LOG"
  timeout --signal=INT --kill-after=8 "$LIMIT" "$@" 2>&1 | tee -a "$LOG"
  rc=${PIPESTATUS[0]}
  echo "== $name: exit code $rc after $((SECONDS - started)) s" | tee -a "$LOG"
  record "$name" "{\"exit_code\": $rc, \"seconds\": $((SECONDS - started)), \"limit\": $LIMIT}"
  [ "$rc" -eq 0 ] || FAILED=1
}
throughput() { # NAME FOLDER SETTINGS
  step "$1" "$PYTHON" -m batchmix benchmark throughput benchmark.peers=[] "benchmark.dir=$2" "${@:3}"
}
smoke() {
  "$PYTHON" -m batchmix generate data.path=examples/support_tickets.jsonl output.dir=build/gpu-check-smoke \
    output.overwrite=true sampling.temperature=0 sampling.max_tokens=64 && "$PYTHON" examples/demo.py build/gpu-check-smoke
}
# The packed folders' files, each once; what a wheel has in NAME.data/purelib or platlib belongs beside its packages.
unpack() {
  "$PYTHON" - "$PEERS_PACKED" "$PEERS_PATH" <<'PY'
import shutil, sys, tarfile, zipfile
from pathlib import Path

packed, place = map(Path, sys.argv[1:])
done = place / ".unpacked"
done.mkdir(parents=True, exist_ok=True)
for path in sorted(packed.rglob("*.*")):
    mark = done / path.name
    if mark.exists() or not path.name.endswith((".whl", ".tar.xz")):
        continue
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            archive.extractall(place)
    else:
        with tarfile.open(path) as archive:
            archive.extractall(place, filter="data")
    for folder in [*place.glob("*.data/purelib"), *place.glob("*.data/platlib")]:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        shutil.rmtree(folder.parent)
    mark.touch()
    print("unpacked:", path)
PY
}
export -f smoke unpack
export PYTHON PEERS_PACKED PEERS_PATH

if [ -d "$PEERS_PACKED" ] && begin unpack 5 60; then step unpack bash -c unpack; fi
for name in $STEPS; do
  case $name in
    unpack) ;; # every call does
    smoke) if begin smoke 10 60; then step smoke bash -c smoke; fi ;;
    synthesise | annotate)
      if begin "$name" 60 150; then throughput "$name" "$OUT" "benchmark.only=[$name]" "${SIZE[@]}"; fi ;;
    long) if begin long 45 100; then throughput long "$OUT" benchmark.only=[long] "${SIZE[@]}"; fi ;;
    fp8) if begin fp8 70 150; then throughput fp8 "$OUT" benchmark.only=[synthesise,annotate] "${SIZE[@]}" "${FP8[@]}"; fi ;;
    steady) # a folder of its own: the file is named like that of synthesise
      if begin steady 150 250; then throughput steady "$OUT/steady" benchmark.only=[synthesise] "${STEADY[@]}"; fi ;;
    tests) # compilation for GPUs that are not there needs no GPU: it is part of the ordinary tests
      if begin tests 60 200; then
        step tests "$PYTHON" -m pytest -q -m "gpu and not slow" --ignore tests/kernels/test_compile.py --durations 10 \
          --continue-on-collection-errors ${WORKERS[@]+"${WORKERS[@]}"} tests
      fi ;;
    tune) # 60 s a format, and as much less as is left
      if begin tune 60 210; then
        seconds=$((GPU ? LIMIT - 30 : 2))
        step tune "$PYTHON" -m batchmix tune "tune.seconds=$seconds" "${TUNE[@]}"
        if [ "$GPU" -eq 1 ] && [ -d kernels/configs ]; then cp -r kernels/configs "$OUT/"; fi
      fi ;;
    peers)
      if [ -d "$PEERS_PATH/vllm" ]; then FROM=("benchmark.peers_path=$PEERS_PATH"); else FROM=(); fi
      if [ ${#FROM[@]} -eq 0 ] && [ -n "$(lacking vllm)" ]; then
        echo "== peers: not started: vLLM is neither installed nor in $PEERS_PACKED" | tee -a "$LOG"
        record peers '{"missing": "vllm"}'
      elif begin peers 100 240; then # no network: all addresses are this machine's own
        export VLLM_HOST_IP=127.0.0.1 NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo
        step peers "$PYTHON" -m batchmix benchmark peers benchmark.peers=[vllm] benchmark.only=[synthesise,annotate] \
          "benchmark.dir=$OUT" ${FROM[@]+"${FROM[@]}"} "${SIZE[@]}"
      fi ;;
    offload)
      if begin offload 60 120; then
        step offload "$PYTHON" -m batchmix benchmark offload "benchmark.dir=$OUT" benchmark.peers=[] "${OFFLOAD[@]}"
      fi ;;
    guided)
      if begin guided 30 60; then
        step guided env "PYTHONPATH=$PWD/benchmarks:$PYTHONPATH" "$PYTHON" benchmarks/bench_guided.py --save \
          --folder "$OUT" "${GUIDED[@]}"
      fi ;;
    kernels)
      if begin kernels 60 150; then
        step kernels "$PYTHON" -m batchmix benchmark kernels "benchmark.dir=$OUT" "${KERNELS[@]}"
      fi ;;
    load)
      if begin load 30 90; then
        step load env "PYTHONPATH=$PWD/benchmarks:$PYTHONPATH" "$PYTHON" benchmarks/bench_load.py \
          --folder "$OUT" "${LOAD[@]}"
      fi ;;
  esac
done
echo "results are in $OUT"
exit "$FAILED"

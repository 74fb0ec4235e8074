#!/bin/bash
# Answers the files of a folder that are new since the last success. For scrontab (docs/clusters.md) or cron:
#   scheduled.sh INPUT RESULTS [key=value ...]
# Each run has an output.dir of its own, RESULTS/<date>. A file is new when no finished run had one of its
# name, size and time of change; RESULTS/.runs says which files a run has. A run that was interrupted is finished first.
set -euo pipefail

if [ $# -lt 2 ] || [ ! -d "$1" ]; then
    echo "usage: scheduled.sh INPUT RESULTS [key=value ...], where the folder INPUT exists" >&2
    exit 2
fi
input=$(realpath "$1")
mkdir -p "$2/.runs"
results=$(realpath "$2")
runs=$results/.runs
shift 2
export PYTHONSAFEPATH=1
for setting in "$@"; do
    case $setting in
        output.dir=* | data.path=* | data.limit=*)
            echo "scheduled.sh: $setting: each run has all rows of the new files and a folder of its own; leave it out" >&2
            exit 2
            ;;
    esac
done
if ! command -v batchmix >/dev/null; then
    echo "scheduled.sh: there is no batchmix on PATH ($PATH); under cron set PATH to the environment's bin folder" >&2
    exit 127
fi

exec 9>"$runs/lock" # until this shell and the run that it starts have ended
if ! flock --nonblock 9; then
    echo "scheduled.sh: another run is at work in $results"
    exit 0
fi

# One line a data file: size, time of change, name. What changed within the last minute may not be whole yet.
files() {
    find -L "$input" -maxdepth 1 -regextype egrep -type f -not -name '[._]*' -not -newermt '-1 minute' \
        -regex '.*\.(jsonl|ndjson|json|parquet|arrow|feather|csv)(\.[a-z0-9]+)?' -printf '%s\t%T@\t%f\n' | LC_ALL=C sort
}

unfinished=""
answered=$(mktemp)
trap 'rm -f "$answered"' EXIT
for list in "$runs"/*.tsv; do
    [ -e "$list" ] || continue
    name=$(basename "$list" .tsv)
    if [ -e "$results/$name/.batchmix/SUCCESS" ] || [ -e "$results/$name/_SUCCESS" ]; then # the latter of earlier releases
        cat "$list" >>"$answered"
    else
        unfinished=$name
    fi
done

if [ -n "$unfinished" ]; then
    run=$unfinished
    if [ -n "$(LC_ALL=C comm -23 "$runs/$run.tsv" <(files))" ]; then
        echo "scheduled.sh: files of the unfinished run $results/$run have changed or gone;" \
            "delete it and $runs/$run.tsv to give it up" >&2
        exit 1
    fi
else
    run=$(date -u +%Y-%m-%dT%H-%M-%SZ)
    while [ -e "$runs/$run.tsv" ]; do # of a run within the same second
        sleep 0.2
        run=$(date -u +%Y-%m-%dT%H-%M-%SZ)
    done
    files | LC_ALL=C comm -23 - <(LC_ALL=C sort -u "$answered") >"$runs/new"
    if [ ! -s "$runs/new" ]; then
        echo "scheduled.sh: no new files in $input"
        exit 0
    fi
    mv "$runs/new" "$runs/$run.tsv"
fi

# The run reads a folder of links: any number of files, whatever their names are made of.
rm -rf "${runs:?}/$run"
mkdir "$runs/$run"
cut -f 3- "$runs/$run.tsv" | while IFS= read -r file; do ln -s "$input/$file" "$runs/$run/$file"; done
echo "scheduled.sh: $(wc -l <"$runs/$run.tsv") files for $results/$run"

quoted=${results//\'/\\\'} # for Hydra, which reads '...' as one text
batchmix generate "$@" "data.path='$quoted/.runs/$run'" "output.dir='$quoted/$run'" &
child=$!
trap 'kill -USR1 "$child"' USR1 TERM INT # commits and ends with 75; the next run does the rest
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a trap ends `wait` early
    code=0
    wait "$child" || code=$?
done
exit "$code"

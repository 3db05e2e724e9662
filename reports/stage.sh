#!/usr/bin/env bash
# Executes one notebook for the workflow, from the root of the checkout:  stage.sh PYTHON RUN_FOLDER KEY THREADS PARAMETERS
# The Snakefile starts it with `setpriv --pdeathsig KILL`, and it starts papermill so: a killed workflow takes them with it, and the kernel ends by itself within about a second.
set -uo pipefail
python=$1 dir=$2 key=$3 threads=$4 parameters=$5
stage=$(basename "$dir"); mark=CXR_NB_RUN=$(realpath -m "$dir")

# Neither a cluster's job that outlived the workflow that sent it nor the kernel of a killed run may write beside this one.
mkdir -p "$dir"; busy=""
exec 9> "$(dirname "$dir")/.$stage.lock"; flock -w 15 9 || busy="of another machine"
for _ in $(seq 150); do
    here=$(grep -lsxz "$mark" /proc/[0-9]*/environ | cut -d/ -f3 | xargs)
    [ -z "$here" ] && break
    sleep .1
done
if [ -n "$busy$here" ]; then echo "$stage: $dir is still being worked in by the processes ${here:-$busy}: end them first" | tee "$dir/error.txt" >&2; exit 1; fi

if [ "$(cat "$dir/.key" 2>/dev/null)" != "$key" ]; then  # not a continuation of the same run: start in an empty folder
    old=$(dirname "$dir")/.replaced/$stage
    rm -rf "$old"; mkdir -p "$(dirname "$old")"; mv "$dir" "$old"; mkdir -p "$dir"
    echo "$key" > "$dir/.key"
fi
rm -f "$dir/error.txt"

env "$mark" OMP_NUM_THREADS="$threads" setpriv --pdeathsig KILL \
    "$python" -m papermill "nbs/$stage.ipynb" "$dir/$stage.ipynb" --cwd . --no-progress-bar -y "$parameters" > "$dir/papermill.log" 2>&1
code=$?
if [ $code = 0 ] && [ ! -f "$dir/run.json" ]; then echo "the notebook ended without run.finish(), so there is no run.json" >> "$dir/papermill.log"; code=1; fi
if [ $code != 0 ]; then
    echo "$stage: $(grep -v '^\s*$' "$dir/papermill.log" | tail -n 1) (exit status $code; traceback in $dir/$stage.ipynb)" > "$dir/error.txt"
fi
exit $code

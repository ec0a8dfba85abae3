#!/usr/bin/env bash
# The whole way of the data on this CPU: benchmark -> bench -> tokens -> rows -> a trained OPT -> a three-level report.
#   examples/demo/run.sh [FOLDER]        everything is written to FOLDER (runs/demo unless given)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${1:-$root/runs/demo}
python=${PYTHON:-python}
steps=300
rows_per_step=8
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" PYTHONWARNINGS=ignore
# megatron-core imports the compiler for fusions that OPT does not have: a third of the start-up time.
export TORCH_COMPILE_DISABLE=1 TORCHDYNAMO_DISABLE=1

say() { printf '\n== %s\n' "$*"; }

# Every part is fast enough to be made anew; a half written folder of an earlier try is of no use. But only that.
if [[ -n "$(ls -A "$folder" 2>/dev/null)" && ! -f "$folder/.demo" ]]; then
    echo "$folder holds something that this demo did not make: got it as FOLDER; allowed: a new or an empty one; name another or remove it" >&2
    exit 2
fi
rm -rf "$folder"
mkdir -p "$folder"
touch "$folder/.demo"
cp "$here/train.yaml" "$folder/train.yaml"
cd "$folder"

say "1/6 consolidate: generated tasks become one bench with three levels of generalisation"
"$python" "$root/tools/preprocess/build_bench.py" --config "$here/bench.yaml" --output bench

say "2/6 tokenise: a byte-level BPE learned from the training split, then every split as token ids"
"$python" "$root/tools/preprocess/train_tokenizer.py" --input bench --vocab-size 2048 --output tokenizer
for split in train validation; do
    "$python" "$root/tools/preprocess/build_corpus.py" --input bench --split "$split" \
        --tokenizer-model tokenizer --output-prefix corpus
done

say "3/6 pack: which document lies where in which row, for the whole run"
pack=("$python" "$root/tools/preprocess/build_plan.py" --row-length 1024 --max-positions 512)
"${pack[@]}" --input corpus/train --rows $((steps * rows_per_step)) --output plan/train
for level in fully_held_out partially_supervised fully_supervised; do
    "${pack[@]}" --input corpus/validation --once --level "$level" --output "plan/$level"
done

say "4/6 evaluate the untrained model"
evaluate=("$python" -m megatron_iml.launch --standalone --nproc-per-node 2 -m megatron_iml.evaluate --config train.yaml)
"${evaluate[@]}" --checkpoint start --output evaluation/untrained

say "5/6 train a tiny OPT with two processes"
PYTHON=$python NUM_PROCESSES=2 "$root/examples/train_cpu.sh" train.yaml training.steps=$steps

say "6/6 evaluate the trained model against the untrained one"
"${evaluate[@]}" --checkpoint "run/checkpoints/$(printf 'iter_%07d' $steps)" --baseline evaluation/untrained \
    --output evaluation/trained

say "done: open $folder/evaluation/trained/report.md"

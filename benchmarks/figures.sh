#!/bin/sh
# Every figure of docs/performance.md that a CPU can give, one after the other, into a folder:
#     sh benchmarks/figures.sh [FOLDER]
# About an hour on two cores, 6 GB of memory, 2 GB of disk. Nothing else should run meanwhile.
set -eu
here=$(dirname "$0")
out=${1:-figures}
mkdir -p "$out"
gentron-bench emoji --backend openvino,onnxruntime --against torch,torch-compile \
    --precision fp32 -o "$out/emoji-fp32" > /dev/null
gentron-bench emoji --backend openvino --stage step --precision bf16 \
    --against torch-compile,diffusers-compile -o "$out/emoji-bf16" > /dev/null
python "$here/step.py" -m xl2 --size 256x256 -o "$out/xl2"
python "$here/layers.py" -m xl2 --size 256x256 --precision bf16 > "$out/layers.md"
python "$here/growth.py" -o "$out/growth" > "$out/growth.md"
python "$here/end_to_end.py" --precision fp32,bf16 --json "$out/end_to_end.json" \
    > "$out/end_to_end.md"
python "$here/host.py" --json "$out/host.json" > "$out/host.md"
python "$here/start.py" --json "$out/start.json" > "$out/start.md"
cat "$out"/*.md

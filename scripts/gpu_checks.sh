#!/usr/bin/env bash
# Runs what needs a GPU and cuda.core, and neither TensorRT nor torch nor the exporter: the tests
# marked `cuda`, from this checkout, with whatever is installed. About a minute.
#
#   GENTRON_TEST_BUNDLES=FOLDER scripts/gpu_checks.sh [PYTHON]
#
# FOLDER holds `tiny-fp16`, which a machine with the exporter makes:
#   gentron-export --model tiny --fp16 -o FOLDER/tiny-fp16
# Without it, and without an exporter, only the tests of memory, copies and captured work run.
# Exit code 124: not done in GPU_CHECKS_SECONDS (85).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
tests=(tests/gpu)
if [[ -n "${GENTRON_TEST_BUNDLES:-}" ]]; then
    [[ -f "$GENTRON_TEST_BUNDLES/tiny-fp16/gentron.json" ]] || {
        echo "GENTRON_TEST_BUNDLES: $GENTRON_TEST_BUNDLES/tiny-fp16 is no bundle" >&2
        exit 2
    }
elif ! "$python" -c 'import diffusers, onnxscript, torch, transformers' 2>/dev/null; then
    echo "no exporter and no GENTRON_TEST_BUNDLES: the loop is left out" >&2
    tests=(tests/gpu/test_device_cuda.py)
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || exit 1
"$python" - <<'END'
import importlib.metadata as metadata, platform
print("python", platform.python_version(), end="")
for name in ("numpy", "cuda-core", "cuda-bindings", "onnxruntime", "pytest"):
    try:
        print(f", {name} {metadata.version(name)}", end="")
    except metadata.PackageNotFoundError:
        print(f", no {name}", end="")
print()
END
started=$SECONDS
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" timeout "${GPU_CHECKS_SECONDS:-85}" \
    "$python" -X faulthandler -m pytest -m cuda -rfEs --tb=short --durations=12 -p no:cacheprovider \
    -o faulthandler_timeout=30 "${tests[@]}"
code=$?
echo "gpu checks: exit code $code after $((SECONDS - started)) s"
exit $code

#!/usr/bin/env bash
# Runs both commands of the README from a clean clone of HEAD, each in a fresh virtual environment,
# then lint, format and types. What is not committed is not tried.
#
#   scripts/fresh_clone.sh [--keep]     --keep leaves the temporary folder behind
#
# PYTHON names the interpreter (default: python3). Needs git, a package index and 4 GB in TMPDIR.
set -euo pipefail

keep=false
for option in "$@"; do
  case $option in
    --keep) keep=true ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) echo "error: unknown option $option; the only one is --keep" >&2 && exit 2 ;;
  esac
done

fail() {
  echo "error: $*" >&2
  exit 1
}

# stage NAME COMMAND...: runs it, says how long it took, stops everything if it fails.
stage() {
  local name=$1 start=$SECONDS code=0
  shift
  echo "== $name"
  "$@" || code=$?
  echo "== $name: $((SECONDS - start)) s"
  [ "$code" -eq 0 ] || fail "$name failed with exit code $code"
}

# in_venv VENV COMMAND: one shell line in the clone, as a person would type it after activation.
in_venv() {
  (
    cd "$clone"
    # shellcheck disable=SC1091
    . "$work/$1/bin/activate"
    bash -euo pipefail -c "$2"
  )
}

# The lines of the first ```sh block of the README that hold "pip install", without comments.
readme_commands() {
  awk '/^```sh[[:space:]]*$/ { inside = 1; next } inside && /^```/ { exit } inside' "$1" |
    sed -E 's/(^|[[:space:]]+)#[[:space:]].*$//' | grep -F 'pip install' || true
}

check_picture() {
  local picture signature found=0
  while IFS= read -r picture; do
    signature=$(head -c 8 "$picture" | od -An -tx1 | tr -d ' \n')
    [ "$signature" = 89504e470d0a1a0a ] || fail "$picture does not start with PNG's signature"
    echo "$(basename "$picture"): $(wc -c <"$picture") bytes"
    found=$((found + 1))
  done < <(find "$clone" -maxdepth 1 -name '*.png' -newer "$work/started")
  [ "$found" -gt 0 ] || fail "the first command wrote no .png into $clone"
}

check_lean() {
  "$work/venv-run/bin/python" -I - <<'PY'
import importlib.util
import sys

heavy = ["torch", "onnx", "transformers", "diffusers"]
found = [name for name in heavy if importlib.util.find_spec(name)]
if found:
    sys.exit(f"installed by the first command, and should not be: {', '.join(found)}")
PY
}

# A static tool cannot follow an editable install whose folders are mapped, so mypy reads a copy
# laid out as the wheel is. It runs outside the clone, whose bare gentron/ would come first.
check_types() {
  in_venv venv-dev "pip install --no-deps --target '$work/installed' ."
  (
    cd "$work"
    MYPYPATH="$work/installed" "$work/venv-dev/bin/mypy" \
      --config-file "$clone/pyproject.toml" --cache-dir "$work/mypy-cache" -p gentron
  )
}

unset PYTHONPATH PYTHONHOME
export PIP_QUIET=1 PIP_PROGRESS_BAR=off # warnings and errors stay
# Under a git hook these point at the repository that runs the hook.
# shellcheck disable=SC2046
unset $(git rev-parse --local-env-vars)

python=${PYTHON:-python3}
root=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
[ -z "$(git -C "$root" status --porcelain)" ] ||
  echo "warning: $root has changes that are not committed; they are not tried" >&2

work=$(mktemp -d "${TMPDIR:-/tmp}/gentron-fresh-clone.XXXXXX")
clone=$work/gentron
# shellcheck disable=SC2317
finish() {
  if $keep; then
    echo "kept: $work"
  else
    rm -rf "$work"
  fi
}
trap finish EXIT

git clone --quiet --no-local "$root" "$clone" || fail "cannot clone $root"
echo "== commit $(git -C "$clone" rev-parse HEAD)"
mapfile -t commands < <(readme_commands "$clone/README.md")
[ ${#commands[@]} -eq 2 ] ||
  fail "README.md: expected 2 lines with 'pip install' in the first sh block, found ${#commands[@]}"

stage "two virtual environments" "$python" -m venv "$work/venv-run" "$work/venv-dev"
touch "$work/started"
stage "command 1: ${commands[0]}" in_venv venv-run "${commands[0]}"
stage "the picture of command 1" check_picture
stage "the packages of command 1" check_lean
stage "command 2: ${commands[1]}" in_venv venv-dev "${commands[1]}"
stage "ruff check ." in_venv venv-dev "ruff check ."
stage "ruff format --check ." in_venv venv-dev "ruff format --check ."
stage "mypy -p gentron" check_types
echo "== the clean clone passed in $SECONDS s"

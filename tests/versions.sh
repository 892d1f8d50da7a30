#!/usr/bin/env bash
# The suite in an environment of its own: tests/versions.sh oldest|newest [arguments of pytest]
#   oldest: the versions of constraints-oldest.txt.   newest: whatever the package index has.
# Both have a torchvision that fits torch, so detection, timm and controlnet-aux are installed and tested as users have
# them. PYTHON picks the interpreter. The environment stays in .venv-oldest or .venv-newest and is brought up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

which=${1:?oldest or newest}
shift
case $which in
    oldest) versions=(--constraint constraints-oldest.txt) ;;
    newest) versions=(--upgrade) ;;
    *) echo "oldest or newest, not $which" >&2 && exit 2 ;;
esac

folder=.venv-$which
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --disable-pip-version-check --quiet "${versions[@]}" \
    --editable ".[all,video,detection,test]" timm 'tomli; python_version < "3.11"'
"$folder/bin/ailurus-hf" doctor
OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest -n auto --maxprocesses 4 "$@"

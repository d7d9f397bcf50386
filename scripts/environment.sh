# Sourced by the scripts beside it: makes .venv if it is missing, installs the exact tested set, activates it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $("$python" --version 2>&1) found, Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
  exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
. .venv/bin/activate
# Reinstalled only when what to install has changed.
stamp=.venv/installed
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv (a few minutes the first time) ..."
  pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)"
  pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
  echo "$wanted" > "$stamp"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

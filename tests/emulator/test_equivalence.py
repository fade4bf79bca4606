"""The one equivalence suite on the CUDA kernels, by way of their bindings and of mmkernels/ops/*/cuda.py; the emulator
takes the place of the GPU. Each call runs under another order of threads, so that the suite's second run, which has to
give the same bits, shows what depends on it."""

import json

import pytest
from draws import some
from emulator_build import BUILDS, CSRC, HERE, run_emulated

from mmkernels.backends import HOT_PATHS

CAPABILITIES = ("8.0", "9.0")
OPS = {folder.parent.name for folder in (CSRC.parent / "mmkernels" / "ops").glob("*/cuda.py")}


# Where each instruction is watched, in one build of the two and for one capability: there each kernel has its own test.
in_builds = pytest.mark.parametrize("build", ["plain", *some(BUILDS[1:])], indirect=True)


def capabilities(build: str) -> list[str]:
    return list(CAPABILITIES) if build == "plain" else some(CAPABILITIES)


@in_builds
def test_every_kernel_equals_its_reference(build, module, seed, tmp_path):
    for capability in capabilities(build):
        assert_equal_to_the_reference(build, module, capability, seed, tmp_path / f"{capability}.json")


def assert_equal_to_the_reference(build, module, capability, seed, file):
    """In float16 and float32 only where nothing slows the kernels down; they are the same templates."""
    command = ["mmkernels", "check", "--backend", "cuda", "--device", "cpu"]
    command += ["--quick", "--seed", str(seed), "--json", str(file)]
    command += [] if build == "plain" else ["--dtype", "bfloat16"]
    ran = run_emulated(build, module, *command, MMKERNELS_EMULATED_CAPABILITY=capability)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    outcomes = json.loads(file.read_text())["outcomes"]
    served = {outcome["op"] for outcome in outcomes if not outcome["unsupported"]}
    assert served == {name for op in OPS for name in HOT_PATHS[op]}
    unserved = {x["dtype"] for x in outcomes if x["unsupported"] and x["op"] in served}
    assert unserved <= {"float32"}


@in_builds
def test_pieces_of_the_losses_are_the_whole(build, module, seed):
    """What schedules across ranks call, of rows and columns in pieces, with ids and without."""
    file = HERE.parent / "ops" / "test_contrastive_rectangle.py"
    for capability in capabilities(build):
        options = {"MMKERNELS_EMULATED_CAPABILITY": capability, "MMKERNELS_TEST_SEED": str(seed)}
        ran = run_emulated(build, module, "pytest", "-p", "no:cacheprovider", "-k", "cuda", str(file), **options)
        assert ran.returncode == 0, ran.stdout + ran.stderr

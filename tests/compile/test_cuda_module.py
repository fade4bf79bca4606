"""What nvcc made of the CUDA kernels, read from the module that was built: one compilation serves every gate.

The disassembler comes with the triton wheel. Which instructions a kernel has to hold is said of its name, so that a new
kernel is a product, held to tensor cores and asynchronous copies, until it is listed otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
from cuda_limits import LIMITS
from limits import complaints, described, rows_without_kernel
from loops import Way, ways_of
from sass import Kernel, kernels_of_module

# Kernels that multiply no matrices.
WITHOUT_PRODUCTS = {"fold_statistics", "clip_weights", "clip_weights_by_ids", "add_tile_sums"}
WITHOUT_PRODUCTS |= {"patch_weight_sum", "span_attention_prepare"}

LOCAL_MEMORY = "LDL|STL"
HOPPER = "sm_90a"  # *_sm90.cu, and nothing else


def multiplies(kernel: Kernel) -> bool:
    return re.search(r"(\w+)_kernel", kernel.name).group(1) not in WITHOUT_PRODUCTS


def wanted(kernel: Kernel) -> tuple[str, ...]:
    """The instructions of sm_80 that it cannot do without."""
    if "_kernel<float, true" in kernel.name:  # exact float32, which no tensor core multiplies
        return ("LDGSTS",)
    if "_kernel<float" in kernel.name:  # tf32: ldmatrix turns numbers of 16 bits only
        return ("HMMA", "LDGSTS")
    return ("HMMA", "LDSM", "LDGSTS")


@pytest.fixture(scope="module")
def built() -> Path:
    spec = importlib.util.find_spec("mmkernels._cuda")
    if spec is None:
        missing = shutil.which("nvcc") is None or os.environ.get("MMKERNELS_CUDA") == "0"
        assert missing, "nvcc is here, but pip install (or python setup.py build_ext --inplace) made no mmkernels._cuda"
        pytest.skip("needs mmkernels._cuda, which nvcc builds")
    return Path(spec.origin)


@pytest.fixture(scope="module")
def kernels(built, tmp_path_factory) -> list[Kernel]:
    return kernels_of_module(built, tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="module")
def loops(kernels) -> list[tuple[Kernel, list[Way]]]:
    """Of the kernels that use tensor cores."""
    return [(kernel, ways_of(kernel)) for kernel in kernels if kernel.count("HG?MMA")]


def test_every_kernel_is_there_for_every_architecture(kernels):
    from mmkernels import _cuda

    built = {re.sub("[af]$", "", name.removesuffix("+ptx")) for name in _cuda.architectures}
    general = {kernel.architecture for kernel in kernels} - {HOPPER}
    assert general == {f"sm_{number}" for number in built}
    for architecture in general:
        names = {kernel.name for kernel in kernels if kernel.architecture == architecture}
        assert names == {kernel.name for kernel in kernels if kernel.architecture == min(general)}, architecture


def test_losses_have_kernels_for_all_that_ids_may_say(kernels):
    """As many for each value of Same, so that a call without ids runs code that compares none."""
    for architecture in {kernel.architecture for kernel in kernels}:
        names = [kernel.name for kernel in kernels if kernel.architecture == architecture]
        counts = [sum(f"Same){same}" in name for name in names) for same in range(3)]
        assert counts[0] > 0 and counts == counts[:1] * 3, f"{architecture}: {counts}"


def call_of_attention(queries: int, head_size: int):
    """Of tensors that are nowhere."""
    from mmkernels import _cuda

    heads = _cuda.Heads(0, 64, 64, 64)
    options = dict.fromkeys(("lo", "hi", "hulls", "lse", "spans_by_batch", "bfloat16", "scale", "softcap"), 0)
    sizes = dict(batch=1, queries=queries, keys=1, heads=1, key_heads=1, value_size=head_size, runs=1)
    return _cuda.SpanAttention(q=heads, k=heads, v=heads, out=heads, head_size=head_size, **sizes, **options)


def test_launchers_for_hopper_refuse_where_there_are_no_kernels_alone(built):
    """Where there are, they come to refuse these sizes. test_cuda_build.py sees a build without."""
    from mmkernels import _cuda

    forward = call_of_attention(queries=0, head_size=0)
    gradients = dict.fromkeys(("d_out", "d_q", "d_k", "d_v"), _cuda.Heads(0, 0, 0, 0))
    backward = _cuda.SpanAttentionBackward(forward=forward, **gradients, d_lse=0, workspace=0)
    has_kernels = "90a" in {name.removesuffix("+ptx") for name in _cuda.architectures}
    launchers = {_cuda.span_attention_forward_sm90: forward, _cuda.span_attention_backward_sm90: backward}
    for launcher, call in launchers.items():
        with pytest.raises(RuntimeError, match="heads of" if has_kernels else "holds no code for sm_90a"):
            launcher(call, 0)


def test_hoppers_launchers_are_those_that_can_be_chosen(built):
    """By the names that mmkernels/ops/_cuda_tensors.py looks for."""
    from mmkernels import _cuda
    from mmkernels.ops._cuda_tensors import VARIANTS

    for variant in VARIANTS:
        launchers = {name for name in dir(_cuda) if name.endswith(f"_{variant.suffix}")}
        assert launchers and {f"{name}_serves" for name in launchers} < set(dir(_cuda))
        assert {name.removesuffix(f"_{variant.suffix}") for name in launchers} < set(dir(_cuda))


def test_constants_of_both_languages_agree(built):
    from mmkernels import _cuda
    from mmkernels.ops.contrastive._feature_gradients import DS_SCALE
    from mmkernels.ops.span_attention.cuda import MAX_HEAD
    from mmkernels.spans import HULL_ROWS

    assert (_cuda.largest_head, _cuda.hull_rows, _cuda.gradient_scale) == (MAX_HEAD, HULL_ROWS, DS_SCALE)


def test_without_a_driver_a_launch_says_which_and_why(built):
    """mmkernels lets no call come so far: it looks for a driver first."""
    from mmkernels import _cuda

    driver, _ = _cuda.versions()
    if driver != 0:
        pytest.skip("needs a machine without an NVIDIA driver")
    with pytest.raises(RuntimeError, match=r"span_attention_forward: launch of .* failed: cudaError\w+ \(.*driver"):
        _cuda.span_attention_forward(call_of_attention(queries=8, head_size=64), 0)
    with pytest.raises(RuntimeError, match=r"span_attention_forward_sm90: the driver has no cuTensorMapEncodeTiled"):
        _cuda.span_attention_forward_sm90(call_of_attention(queries=8, head_size=64), 0)


def test_no_kernel_spills(kernels):
    """No local memory either, which an array indexed at run time would take."""
    spilt = [f"{kernel}: {kernel.registers} registers, {kernel.stack} bytes of stack" for kernel in kernels
             if kernel.stack or kernel.count(LOCAL_MEMORY)]  # fmt: skip
    assert not spilt, "\n".join(spilt)


def test_no_kernel_adds_floats_in_the_order_of_arrival(kernels):
    found = [str(kernel) for kernel in kernels if kernel.count(r"(?:REDG?|ATOM[GS]?)\.\S*\bF(?:16|32|64|BF16)")]
    assert not found, "\n".join(found)


def test_products_use_tensor_cores_and_asynchronous_copies(kernels):
    lacking = [
        f"{kernel} has no {instruction}"
        for kernel in kernels
        for instruction in wanted(kernel)
        if kernel.architecture != HOPPER and multiplies(kernel) and not kernel.count(instruction)
    ]
    assert not lacking, "\n".join(lacking)


def test_hopper_uses_its_own_instructions(kernels):
    failures = []
    for kernel in kernels:
        if kernel.architecture != HOPPER or not multiplies(kernel):
            continue
        if not kernel.count("HGMMA") or not kernel.count("UTMALDG"):
            failures.append(f"{kernel}: {kernel.count('HGMMA')} HGMMA, {kernel.count('UTMALDG')} UTMALDG")
        if kernel.count("HMMA"):
            failures.append(f"{kernel} fell back to HMMA")
        if kernel.count(r"BRA\.U\.ANY"):  # a copy in `if (lane == 0)` instead of elect_one()
            failures.append(f"{kernel} loops over lanes around a copy")
    assert not failures, "\n".join(failures)


def test_no_loop_is_slower_than_its_limit(loops):
    failures = [f"{kernel.architecture}: {complaint}" for kernel, ways in loops
                for complaint in complaints(kernel.short_name, ways, LIMITS)]  # fmt: skip
    failures += rows_without_kernel(LIMITS, [kernel.short_name for kernel, _ in loops])
    assert not failures, "\n".join([*failures, "docs/gpu.md says how to read these figures"])


def test_attention_on_hopper_takes_exponentials_while_it_multiplies(loops):
    """Before it waits for what is under way: the products of the values in the forward, of d_out in the others."""
    inner = [
        (kernel, way)
        for kernel, ways in loops
        if kernel.architecture == HOPPER and "contrastive" not in kernel.name
        for way in ways
        if not way.name.startswith("outer")
    ]
    assert inner
    failures = [
        f"{kernel} hides {way.events.hidden} of {way.events.exponentials}\n  {described(way)}"
        for kernel, way in inner
        if way.events.hidden < way.events.exponentials
    ]
    assert not failures, "\n".join(failures)

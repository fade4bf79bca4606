"""`scripts/validate_gpu.sh --short` without a GPU: results are on the disk as they come, a second call goes on where
the first ended, and what hangs or crashes is lost alone."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
sys.path.append(str(Path(__file__).parent / "emulator"))

from emulator_build import compiled_by_nvcc, needs_nvcc
from gpu import attention, losses, timing
from gpu.__main__ import in_order
from gpu.pool import Pool, Row
from gpu.records import Records, build, sources
from gpu.steps import STEPS, module_of, rows_of
from gpu.summary import ENDS, page

import mmkernels
from mmkernels.backends import HOT_PATHS, is_written

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "validate_gpu.sh"


# ---- rows, each in a process that may go wrong


def test_a_row_that_fails_hangs_or_crashes_is_lost_alone(tmp_path):
    rows = [
        Row("first", partial(dict, answer=1)),
        Row("raises", partial(json.loads, "{")),
        Row("hangs", partial(time.sleep, 1000)),
        Row("ends", partial(os._exit, 3)),
        Row("dies", partial(signal.raise_signal, signal.SIGSEGV)),
        Row("last", partial(dict, answer=2)),
    ]
    start = time.monotonic()
    with Pool(tmp_path / "log.txt") as pool:
        found = dict(pool.run(rows, 1, 2.0, start + 100))
    assert time.monotonic() - start < 60
    assert list(found) == [row.name for row in rows], "they are measured in the order in which they are named"
    assert found["first"]["answer"] == 1 and found["last"]["answer"] == 2
    failures = {name: result["failure"] for name, result in found.items() if "failure" in result}
    assert failures["raises"].startswith("JSONDecodeError: Expecting property name")
    assert failures["hangs"] == "took longer than 2 s, and was ended"
    assert failures["ends"] == "its process died with exit code 3"
    assert failures["dies"] == f"its process died with signal {int(signal.SIGSEGV)}"


def test_a_step_ends_in_time_and_its_processes_with_it(tmp_path):
    rows = [Row("quick", partial(dict, answer=1)), *(Row(f"slow {i}", partial(time.sleep, 1000)) for i in range(4))]
    with Pool(tmp_path / "log.txt") as pool:
        start = time.monotonic()
        found = dict(pool.run(rows, 2, 500.0, start + 6))
        assert time.monotonic() - start < 20
        assert found.pop("quick")["answer"] == 1
        assert len(found) == 2, "what was not begun has no result"
        for result in found.values():
            assert result["skipped"].startswith("was under way for ")
        found = dict(pool.run([Row("next", partial(dict, answer=2))], 1, 20.0, time.monotonic() + 60))
        assert found["next"]["answer"] == 2
    assert not multiprocessing.active_children()


# ---- what is known so far


def test_records_survive_a_machine_that_goes_and_other_sources(tmp_path):
    records = Records(tmp_path, "now")
    records.add("check", "a", {"ms": 1.0})
    records.add("check", "b", {"failure": "is off"})
    records.add("check", "c", {"skipped": "no tool here"})
    Records(tmp_path, "then").add("check", "d", {"ms": 4.0})
    file = tmp_path / "records.jsonl"
    file.write_bytes(file.read_bytes() + b'{"sources": "now", "step": "che')  # written when it went
    again = Records(tmp_path, "now")
    assert [row for row in "abcd" if again.settled("check", row)] == ["a"]
    again.add("check", "b", {"ms": 2.0})
    known = {"a": {"ms": 1.0}, "b": {"ms": 2.0}, "c": {"skipped": "no tool here"}}
    assert Records(tmp_path, "now").steps["check"] == known
    again.add("check", None)
    assert "check" not in Records(tmp_path, "now").steps and Records(tmp_path, "then").settled("check", "d")


def test_steps_that_were_not_ended_come_before_what_was_left_of_others(tmp_path):
    records = Records(tmp_path, "now")
    for step in ("info", "check"):
        records.add(ENDS, step, {"left": 3, "seconds": 1.0})
    assert in_order(["info", "check", "losses", "bench", "summary"], records) == [
        *("losses", "bench"),
        *("info", "check"),
        "summary",
    ]


# ---- the steps


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("step", STEPS)
def test_rows_are_known_without_touching_a_gpu(step, device):
    names = [row.name for row in rows_of(step, device)]
    assert names and len(set(names)) == len(names)
    assert module_of(step).ROW_SECONDS <= module_of(step).SECONDS


def test_small_cases_in_the_dtypes_that_are_trained_in_are_checked_first():
    names = [row.name.split("|") for row in rows_of("check", "cuda")]
    assert {(backend, dtype) for _, _, backend, dtype in names[:8]} == {
        (backend, dtype) for backend in ("cuda", "triton") for dtype in ("bfloat16", "float32")
    }
    assert {op for op, *_ in names[:28]} == {op for ops in HOT_PATHS.values() for op in ops}


def test_every_op_with_cuda_kernels_is_watched_for_races():
    with_kernels = {op for path, ops in HOT_PATHS.items() if is_written(path, "cuda") for op in ops}
    assert {row.name for row in rows_of("racecheck", "cuda")} == with_kernels


# As a Hopper GPU would give them.
TIMED = {"ms": 1.5, "ms_p10": 1.4, "ms_p90": 1.6, "clock_mhz": 1700.0, "tflops": 700.0, "share": 0.76}
TIMED |= {"error_of_budget": 0.4}
RATE = {"columns": 64, "a_from": "shared", "warpgroups": 2, "cycles": 32.1, "cycles_most": 32.2, "expected": 32}
RATE |= {"clock_mhz": 1700, "tflops": 800}
KERNELS = {"kernels": {"contrastive_sm90_kernel SigLipPass": 1.0}, "tiles_ms": 1.0, "clock_mhz": 1700.0, "share": 0.8}
RESULTS = {
    "racecheck": {"clip_loss": {"summary": "RACECHECK SUMMARY: 0 hazards displayed", "hazards": []}},
    "wgmma": {"rates": {"rates": [RATE]}},
    "losses": {
        "siglip_loss 512 cuda": {"fwd": TIMED, "fwd_bwd": TIMED},
        "siglip_loss 512 kernels": {"fwd": KERNELS, "fwd_bwd": KERNELS},
    },
    "attention": {
        "64|causal|mmkernels:cuda": {"fwd": TIMED, "fwd_bwd": TIMED, "bwd": TIMED},
        "64|causal|SDPA, cuDNN": {"skipped": "RuntimeError: no"},
        "64|causal|kernels": {"kernels": {"key_grads_kernel": 1.0}, "clock_mhz": 1700.0},
    },
}


def test_the_summary_puts_what_was_expected_beside_what_was_measured(tmp_path):
    records = Records(tmp_path, "now")
    for step, results in RESULTS.items():
        for row, result in results.items():
            records.add(step, row, result)
    said = "\n".join(" ".join(line.split()) for line in page(tmp_path, records))
    assert "cannot be told" not in said
    for expected in (
        "clip_loss: RACECHECK SUMMARY: 0 hazards",
        "64 shared 2 32.10 32.20 32 1700 800",
        "siglip_loss 512 cuda 1.50 1700 700 0.760 0.800 0.400",
        "64 causal mmkernels:cuda 1.50 700 0.760 0.970 1.50 700 0.760 0.660 1700 0.400",
        "skipped 64|causal|SDPA, cuDNN: RuntimeError: no",
        "key_grads_kernel 1.000 ms",
    ):
        assert expected in said, said


def test_kernels_go_by_their_own_names():
    spelled = (
        "void mmk::cuda::(anonymous namespace)::contrastive_sm90_kernel<__nv_bfloat16, mmk::cuda::(anonymous namespace)"
        "::SigLipPass<__nv_bfloat16, (mmk::cuda::Same)0, true> >(CUtensorMap_st, CUtensorMap_st)"
    )
    assert timing.short_name(spelled) == "contrastive_sm90_kernel SigLipPass"
    assert timing.short_name("void mmk::cuda::key_grads_kernel<__half, 64>(mmk::Maps)") == "key_grads_kernel"
    assert timing.short_name("nvjet_tst_128x256_64x4") == "nvjet_tst_128x256_64x4"


def test_the_clock_is_asked_of_nvidia_smi_where_the_driver_does_not_tell(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 1755\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(timing, "clock_of_the_driver", lambda: 1 / 0)
    with timing.Clock("cuda") as clock:
        time.sleep(0.5)
    assert clock.mhz == 1755
    with timing.Clock("cpu") as clock:
        pass
    assert clock.mhz is None


def test_all_of_the_tensor_cores_is_what_the_vendor_names(monkeypatch):
    """989 TFLOP/s of a H100 at 1830 MHz."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    assert timing.share(989e12, 1000.0, 1830.0, "cuda") == pytest.approx(1, rel=0.01)
    assert timing.share(989e12, 1000.0, None, "cuda") is None and timing.share(1, 1.0, 1.0, "cpu") is None


@pytest.mark.parametrize("dim", [64, 128])
def test_what_is_measured_on_a_gpu_is_of_the_sizes_that_are_named(dim):
    """Operations as by hand."""
    causal, full = (attention.case(dim, seen, "cuda") for seen in ("causal", "full"))
    pairs = 16384 * 16384 * 16
    assert full.flops("fwd") == 4 * pairs * dim and full.flops("fwd_bwd") == 14 * pairs * dim
    assert causal.flops("fwd") == 4 * dim * 16 * (16384 * 16385 // 2)
    assert losses.case("clip_loss", 1024, "cuda").flops("fwd") == 2 * 32768 * 32768 * 1024


@needs_nvcc
def test_the_program_of_products_alone_compiles_without_a_warning_or_a_spill(tmp_path):
    compiled_by_nvcc(ROOT / "scripts" / "gpu" / "wgmma_rates.cu", "sm_90a", tmp_path)


# ---- the script


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """With the package that is tested as what the script has installed."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "mmkernels").symlink_to(Path(mmkernels.__file__).parent)
    (site / "sources").write_text(build() + "\n")
    return os.environ | {"OUT": str(tmp_path / "out"), "SITE": str(site), "PYTHON": sys.executable}


def results_of(folder: Path, step: str) -> dict[str, dict]:
    return Records(folder, sources()).steps.get(step, {}) if folder.exists() else {}


def kill_session(leader: int) -> None:
    """As a machine goes; but for the processes of rows, which end by themselves."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, _, rest = stat.read_text().partition(" (")
            if int(rest.rpartition(") ")[2].split()[3]) == leader:
                os.kill(int(pid), signal.SIGKILL)


def test_a_second_call_goes_on_where_the_first_was_cut(tmp_path, environment):
    out, command = tmp_path / "out", [SCRIPT, "--device", "cpu", "--short", "install", "losses"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as first:
        until = time.monotonic() + 60
        while not results_of(out, "losses") and time.monotonic() < until:
            time.sleep(0.1)
        kill_session(first.pid)
    before = results_of(out, "losses")
    assert before and len(before) < len(rows_of("losses", "cpu")), "a result is on the disk before the step is over"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    after = results_of(out, "losses")
    assert set(after) == {row.name for row in rows_of("losses", "cpu")}
    assert {row: after[row] for row in before} == before, "what was known is not measured again"
    log = (out / "log.txt").read_text()
    assert "was made of these sources" in log and "Building wheel" not in log
    assert f"losses: {len(after) - len(before)} of {len(after)} rows to measure" in log
    summary = (out / "summary.txt").read_text()
    assert f"losses: {len(after)} measured; " in summary and "== install: passed" in summary


def test_steps_are_those_that_there_are(environment):
    done = subprocess.run([SCRIPT, "--short", "everything"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "--short [STEP...]" in done.stderr

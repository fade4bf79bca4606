"""`mmkernels info`, `check` and `bench`: what they print, and with which code they end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkernels import backends, cli
from mmkernels.check import session
from mmkernels.ops.contrastive import reference

ONE = ["--op", "clip_loss", "--case", "3x7, scale 1"]


def test_info_names_versions_and_every_backend(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "instruction set" in out
    for name in backends.NAMES:
        assert f"backend {name}:" in out


def test_info_says_what_mends_a_missing_core(capsys, monkeypatch):
    reason = "no C++ compiler was found; mend: install one"
    monkeypatch.setattr(backends, "missing", lambda name: reason if name == "cpu" else None)
    assert cli.main(["info"]) == 0
    assert f"backend cpu: not there: {reason}" in capsys.readouterr().out


def test_check_prints_a_table_and_the_seed_and_writes_json(capsys, tmp_path):
    file = tmp_path / "outcomes.json"
    assert (
        cli.main(["check", *ONE, "--backend", "reference", "--device", "cpu", "--seed", "11", "--json", str(file)]) == 0
    )
    out = capsys.readouterr().out
    assert "seed 11" in out and out.count("1 of 1") == 3
    content = json.loads(file.read_text())
    assert {outcome["dtype"] for outcome in content["outcomes"]} == {"float32", "bfloat16", "float16"}
    assert all(q["error"] <= q["budget"] for outcome in content["outcomes"] for q in outcome["quantities"])


def test_check_tells_a_failure_and_how_to_see_it_again(capsys, monkeypatch):
    monkeypatch.setattr(reference, "clip_loss_with_grads", broken(reference.clip_loss_with_grads))
    command = ["check", *ONE, "--backend", "reference", "--device", "cpu", "--dtype", "float32", "--seed", "5"]
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert "0 of 1" in out and "d_text_features is off by" in out
    expected = (
        "mmkernels check --op clip_loss --case '3x7, scale 1' --backend reference --dtype float32 --device cpu --seed 5"
    )
    assert expected in out


def broken(function):
    def wrong(image, *others):
        results = list(function(image, *others))
        if image.dtype != torch.float64:  # the truth stays
            results[2] = results[2] * 1.05
        return tuple(results)

    return wrong


def test_a_backend_that_is_not_there_fails_only_when_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name: None if name == "reference" else f"{name} is on holiday")
    assert cli.main(["check", *ONE, "--device", "cpu", "--dtype", "float32"]) == 0
    assert "cpu is not checked: cpu is on holiday" in capsys.readouterr().out
    assert cli.main(["check", *ONE, "--backend", "cpu"]) == 1
    assert "cpu is not checked: cpu is on holiday" in capsys.readouterr().out


def test_check_interprets_triton_in_a_process_of_its_own():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mmkernels", "check", *ONE, "--backend", "triton", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("triton, interpreted") == 3 and done.stdout.count("1 of 1") == 3


def test_a_process_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(session.sys, "executable", "/bin/false")
    place = session.Place("triton", "cpu", interpreted=True)
    (record,) = session.run(session.Request(backend="triton"), [place], lambda *_: None)
    assert "ended with code 1" in record["failures"][0]


def test_unknown_cases_and_devices_are_errors_of_the_command(capsys):
    assert cli.main(["check", "--case", "3x8"]) == 2
    assert "no case is called '3x8'; there are: 37x65; 1x1;" in capsys.readouterr().out
    assert cli.main(["bench", "--case", "3x8"]) == 2
    assert "1024x512" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device", "cuda"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["bench", "--dtype", "int8"])


def test_bench_ends_with_1_when_a_budget_is_missed(capsys, monkeypatch, tmp_path):
    command = ["bench", "--quick", "--op", "clip_loss", "--dtype", "float32", "--pass", "fwd_bwd", "--device", "cpu"]
    file = tmp_path / "figures.json"
    assert cli.main([*command, "--json", str(file)]) == 0
    assert "clip_loss" in capsys.readouterr().out and json.loads(file.read_text())["schema"] == 1
    monkeypatch.setenv("MMKERNELS_BACKEND", "reference")
    monkeypatch.setattr(reference, "clip_loss_with_grads", broken(reference.clip_loss_with_grads))
    assert cli.main(command) == 1
    assert "no figure: clip_loss 512x256 float32 fwd_bwd mmkernels:reference" in capsys.readouterr().out


def test_a_terminated_check_tells_what_it_knew(capsys, monkeypatch, tmp_path):
    def terminate(case, dtype, backend, *others, real=session.run_case):
        if dtype == torch.float16:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(case, dtype, backend, *others)

    monkeypatch.setattr(session, "run_case", terminate)
    file = tmp_path / "outcomes.json"
    assert cli.main(["check", *ONE, "--backend", "reference", "--device", "cpu", "--json", str(file)]) == 1
    assert "interrupted after 2 of 3 cases" in capsys.readouterr().out
    assert [bool(outcome["failures"]) for outcome in json.loads(file.read_text())["outcomes"]] == [False, False, True]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


SCRIPT = Path(__file__).parents[1] / "scripts" / "validate_gpu.sh"


def validate(tmp_path, *arguments, python):
    environment = os.environ | {"OUT": str(tmp_path / "out"), "SITE": str(tmp_path / "site"), "PYTHON": python}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=60)


def test_validation_goes_on_after_a_failed_phase_and_ends_with_1(tmp_path):
    done = validate(tmp_path, "install", "info", "check", "bench", python="false")
    assert done.returncode == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    for phase in ("install", "info", "check-clip_loss", "check-patch_embed", "bench-bfloat16", "bench-float32"):
        assert f"== {phase}: FAILED, code 1" in log


def test_validation_passes_when_its_phases_do(tmp_path):
    (tmp_path / "site" / "mmkernels").mkdir(parents=True)  # as the install phase would leave it
    done = validate(tmp_path, "--device", "cpu", "install", "info", "test", "summary", python="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": passed") == 7  # four phases, three of them again in the summary
    assert validate(tmp_path, "--device", "tpu", python="true").returncode == 2
    assert "PHASE..." in validate(tmp_path, "everything", python="true").stderr

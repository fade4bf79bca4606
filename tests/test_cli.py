"""`mmkernels info`, `explain`, `check`, `bench` and `plan`: what they print, and with which code they end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels import backends, cli
from mmkernels.bench import runner
from mmkernels.check import session
from mmkernels.ops.contrastive import reference

ONE = ["--op", "clip_loss", "--case", "3x7, scale 1"]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    """A terminal's default, whatever the tests run in."""
    monkeypatch.setenv("COLUMNS", "80")


def refused(command, capsys) -> str:
    """What is said of a command that is wrong: nothing else happens."""
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_info_names_versions_and_every_backend(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "instruction set" in out
    for name in backends.NAMES:
        assert f"backend {name} " in out
    assert max(map(len, out.splitlines())) <= 80


def test_info_says_what_mends_a_missing_core(capsys, monkeypatch):
    reason, real = "no C++ compiler was found; mend: install one", backends.missing
    monkeypatch.setattr(backends, "missing", lambda name: reason if name == "cpu" else real(name))
    assert cli.main(["info"]) == 0
    assert f"not there: {reason}" in " ".join(capsys.readouterr().out.split())


def test_info_as_json_holds_what_the_table_shows(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__ and set(facts["backends"]) == set(backends.NAMES)
    assert cli.main(["info"]) == 0
    table = "".join(capsys.readouterr().out.split())
    for name, value in (facts | facts.pop("backends")).items():
        assert f"{name}{'none' if value is None else value}".replace(" ", "") in table


@pytest.mark.parametrize(
    "missing, state",
    [
        (backends.NO_GPU_FOR_TRITON, "there is no GPU to run it: `mmkernels check` runs its quick cases in Triton's"),
        ("triton is 3.2.0; the kernels need 3.4", "not there: triton is 3.2.0; the kernels need 3.4"),
    ],
)
def test_info_and_check_say_the_same_of_triton(missing, state, capsys, monkeypatch):
    real = backends.missing
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "missing", lambda name: missing if name == "triton" else real(name))
    assert cli.main(["info"]) == 0
    assert state in " ".join(capsys.readouterr().out.split())
    code = cli.main(["check", *ONE, "--backend", "triton", "--dtype", "float32"])
    out = capsys.readouterr().out
    assert state.removeprefix("not there: ") in out
    assert (code, out.count("1 of 1")) == ((0, 1) if missing == backends.NO_GPU_FOR_TRITON else (1, 0))


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"mmkernels {mmkernels.__version__}\n"


def test_completion_is_printed_for_a_shell(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert end.value.code == 0 and "explain" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize("command", ["info", "explain", "check", "bench", "plan"])
def test_help_explains_every_option_and_the_exit_codes(command, capsys):
    (commands,) = (action for action in cli._parser()._actions if action.choices and command in action.choices)
    assert all(action.help for action in commands.choices[command]._actions)
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert cli.EXIT_CODES in capsys.readouterr().out


def test_the_docs_tell_every_option_and_exit_code():
    sections = (Path(__file__).parents[1] / "docs" / "cli.md").read_text().split("\n## ")
    told = {section.split()[0]: section for section in sections}
    (commands,) = (action for action in cli._parser()._actions if isinstance(action.choices, dict))
    for name, command in commands.choices.items():
        assert all(
            f"`{action.option_strings[-1]}" in told[name] for action in command._actions[1:] if action.option_strings
        )
    assert all(f"| {code} |" in told["Exit"] for code in (cli.RIGHT, cli.WRONG, cli.USAGE, cli.INTERRUPTED))


@pytest.mark.parametrize("case", [[], ["--case", "text-4096x40x128"], ["--case", "one third of a fused projection"]])
def test_explain_says_what_each_backend_makes_of_a_call(case, capsys):
    assert cli.main(["explain", "rotary_embed", *case, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "x bfloat16" in out and (not case or case[1] in out)
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith(backends.NAMES)}
    assert list(lines) == list(backends.NAMES)
    assert lines["cpu"].strip() == "chosen" and lines["reference"].strip() == "usable"
    assert "no kernels of rotary_embed" in lines["cuda"]


@pytest.mark.parametrize("op", cli.OPS)
def test_explain_knows_a_call_of_every_op(op, capsys):
    assert cli.main(["explain", op, "--device", "cpu"]) == 0
    assert "chosen" in capsys.readouterr().out
    assert "no case is called 'nowhere'" in refused(["explain", op, "--case", "nowhere"], capsys)


@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(command, capsys, monkeypatch, tmp_path):
    assert "there is no folder" in refused([command, "--json", str(tmp_path / "none" / "x.json")], capsys)
    assert "is a folder" in refused([command, "--json", str(tmp_path)], capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written to" in refused([command, "--json", str(tmp_path / "x.json")], capsys)
    assert not list(tmp_path.iterdir())


def test_a_log_tells_how_much_there_is_and_that_it_lives(capsys, monkeypatch):
    monkeypatch.setattr(cli, "LOG_SECONDS", 0.0)
    assert cli.main(["check", *ONE, "--backend", "reference", "--device", "cpu"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "3 cases, about 10 seconds"
    assert rest[2].endswith(" s: 2 of 3 done, now clip_loss on reference")
    assert cli.main(["bench", "--op", "clip_loss", "--quick", "--dtype", "float32", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "1 case in 1 dtype, about 10 seconds" in out and "0 of 1 done, now clip_loss 512x256 float32" in out


def test_what_takes_longer_is_expected_to():
    def check(**asked) -> float:
        request = session.Request(device="cpu", **asked)
        return session.expected_seconds(request, session.places(request))

    assert check(quick=True, backend="cpu") < check(backend="cpu") < check(backend=None)
    assert session.expected_seconds(session.Request(), [session.Place("cuda", "cuda")]) is None  # never measured
    quick, whole = (runner.expected_seconds(runner.Request(quick=quick)) for quick in (True, False))
    large, forward = (runner.Request(cases=("8192x512",), passes=passes) for passes in (("fwd", "fwd_bwd"), ("fwd",)))
    assert 30 < quick < 300 < whole < 7200
    assert runner.expected_seconds(forward) < runner.expected_seconds(large) / 2


def test_the_wait_for_the_interpreter_is_told():
    place, told = session.Place("triton", "cpu", interpreted=True), []
    session.run(session.Request("clip_loss", "3x7, scale 1", dtype="float32"), [place], lambda *step: told.append(step))
    assert len(told) > 1 and set(told) == {("waiting for Triton's interpreter on 1 cases", 0, 0)}


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


def test_check_interprets_triton_in_a_process_of_its_own(decoy):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [Path(sys.executable).with_name("mmkernels"), "check", *ONE, "--backend", "triton", "--device", "cpu"]
    done = subprocess.run(command, env=environment, cwd=decoy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("triton, interpreted") == 3 and done.stdout.count("1 of 1") == 3


def test_a_process_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(session.sys, "executable", "/bin/false")
    place = session.Place("triton", "cpu", interpreted=True)
    (record,) = session.run(session.Request(backend="triton"), [place], lambda *_: None)
    assert "ended with code 1" in record["failures"][0]


def test_unknown_cases_and_devices_are_errors_of_the_command(capsys):
    assert "no case is called '3x8'; there are: 37x65; 1x1;" in refused(["check", "--case", "3x8"], capsys)
    assert "1024x512" in refused(["bench", "--case", "3x8"], capsys)
    assert "invalid choice: 'int8'" in refused(["bench", "--dtype", "int8"], capsys)
    if not torch.cuda.is_available():
        assert "torch sees no GPU here" in refused(["bench", "--device", "cuda"], capsys)


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
    assert cli.main(["check", *ONE, "--backend", "reference", "--device", "cpu", "--json", str(file)]) == 130
    assert "interrupted after 2 of 3 cases" in capsys.readouterr().out
    assert [bool(outcome["failures"]) for outcome in json.loads(file.read_text())["outcomes"]] == [False, False, True]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_interrupted_bench_ends_with_130(capsys, monkeypatch):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner, "_measure", interrupt)
    command = ["bench", "--quick", "--op", "clip_loss", "--device", "cpu"]
    assert cli.main(command) == 130
    assert "interrupted: there would have been more" in capsys.readouterr().out
    monkeypatch.setattr(runner, "expected_seconds", interrupt)  # before anything is known
    assert cli.main(command) == 130


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

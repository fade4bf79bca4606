"""Type checkers find types on the public names, and a user's code over them right."""

import subprocess
import sys
from pathlib import Path

import mmkernels

USER = Path(__file__).parent / "typed" / "user.py"


def by_mypy(file: Path, cache: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(cache),
        str(file),
    ]
    folder = Path(mmkernels.__file__).parents[1]
    environment = {} if folder.name == "site-packages" else {"MYPYPATH": str(folder)}  # of an editable install
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache, check=False)


def test_a_users_code_is_right_by_mypy_and_a_wrong_call_is_not(tmp_path):
    done = by_mypy(USER, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(USER.read_text().replace("interleaved=True", "interleaved='yes'"))
    done = by_mypy(wrong, tmp_path)
    assert done.returncode == 1 and 'Argument "interleaved" to "rotary_embed" has incompatible type' in done.stdout


def test_the_users_code_holds_every_public_name():
    text = USER.read_text()
    assert not [name for name in (*mmkernels.__all__, *mmkernels.nn.__all__) if name not in text]


def test_the_version_is_said_once():
    """Beside the module that holds it, the citation and the changelog name the newest."""
    for name in ("CITATION.cff", "CHANGELOG.md"):
        assert mmkernels.__version__ in (Path(__file__).parents[1] / name).read_text()


def test_the_package_says_that_it_is_typed():
    assert Path(mmkernels.__file__).with_name("py.typed").exists()

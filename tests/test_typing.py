"""Type checkers find types on the public names, and a user's code over them right."""

import subprocess
import sys
from pathlib import Path

import mmkernels


def test_a_users_code_is_right_by_mypy(tmp_path):
    user = Path(__file__).parent / "typed" / "user.py"
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path),
        str(user),
    ]
    folder = Path(mmkernels.__file__).parents[1]
    environment = {} if folder.name == "site-packages" else {"MYPYPATH": str(folder)}  # of an editable install
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    ours = [line for line in done.stdout.splitlines() if "user.py" in line]
    assert not ours and "error" not in done.stderr, done.stdout + done.stderr


def test_the_version_is_said_once():
    """Beside the module that holds it, the citation and the changelog name the newest."""
    for name in ("CITATION.cff", "CHANGELOG.md"):
        assert mmkernels.__version__ in (Path(__file__).parents[1] / name).read_text()


def test_the_package_says_that_it_is_typed():
    assert Path(mmkernels.__file__).with_name("py.typed").exists()

"""What the README shows can be run as it stands."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_examples_run_in_order():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)


def test_both_commands_start_from_nothing():
    for name, ending in (("bench", "mmkernels bench"), ("test", "pytest -n 3 --dist loadfile")):
        (command,) = re.findall(rf"<!-- {name} command -->\n```sh\n(.*)\n```", README)
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(ending)

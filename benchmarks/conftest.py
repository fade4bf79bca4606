"""pytest-benchmark over the cases of `mmkernels bench`; the options are those of the command."""

import pytest
import torch

from mmkernels.bench import Request
from mmkernels.bench.cases import OPS
from mmkernels.check.suite import name_of


def pytest_addoption(parser):
    group = parser.getgroup("mmkernels")
    group.addoption("--quick", action="store_true", help="small sizes, a few seconds")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--op", action="append", default=[])
    group.addoption("--case", action="append", default=[])


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    request = Request(tuple(option("op")), tuple(option("case")), device=option("device"), quick=option("quick"))
    runs = [
        pytest.param(case, dtype, direction, which, id=f"{case.op}-{case.name}-{name_of(dtype)}-{direction}-{which}")
        for case in request.selected()
        for dtype in request.dtypes
        for direction in case.passes
        for which in _implementations(case, request.device)
    ]
    metafunc.parametrize(("case", "dtype", "direction", "which"), runs)


def _implementations(case, device) -> tuple[str, ...]:
    """Ours, the first of the peers and, where there are several, the last: usually the fastest."""
    several = OPS[case.op].several_peers or device in case.compiled
    return ("ours", "eager", "last peer") if several else ("ours", "eager")

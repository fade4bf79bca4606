"""What the tests of the compiled core share. They need the core: without it they fail here, they do not pass by."""

import pytest

import mmkernels  # noqa: F401  (brings torch, whose threads the core works on)
from mmkernels import _core


@pytest.fixture(params=_core.isa_levels())
def level(request, monkeypatch) -> str:
    """Each instruction-set level this processor runs, chosen for the test."""
    monkeypatch.setenv("MMKERNELS_CPU_ISA", request.param)
    assert _core.isa() == request.param
    return request.param

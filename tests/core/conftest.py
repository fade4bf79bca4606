"""What the tests of the compiled core share. They need the core: without it they fail here, they do not pass by."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from programs import LEVELS, Builds, Program
from torch import Tensor

from mmkernels import _core


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch) -> str:
    """An instruction-set level, chosen for the test."""
    monkeypatch.setenv("MMKERNELS_CPU_ISA", request.param)
    assert _core.isa() == request.param
    return request.param


def pytest_collection_modifyitems(config, items):
    """AMX serves bfloat16 alone: another dtype would be served by the level below, which is tested by itself."""

    def serves(item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return params.get("level") != "amx" or params.get("dtype", torch.bfloat16) == torch.bfloat16

    config.hook.pytest_deselected(items=[item for item in items if not serves(item)])
    items[:] = filter(serves, items)


@pytest.fixture
def same_for_any_threads() -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """same_for_any_threads(compute): its tensors must not differ in a bit, whatever number of threads cuts the work."""

    def check(compute: Callable[[], Sequence[Tensor]]) -> None:
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3, 5, 2):
                torch.set_num_threads(threads)
                results.append(compute())
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for first, again in zip(results[0], other, strict=True):
                assert torch.equal(first, again)

    return check


@pytest.fixture(scope="module")
def builds(request, tmp_path_factory) -> Iterator[Builds]:
    """Starts with those of all tests of the file, in their order, at the first that needs one."""
    own = [item for item in request.session.items if item.module is request.module]
    calls = [item.callspec.params for item in own if hasattr(item, "callspec")]
    programs = dict.fromkeys(params["program"] for params in calls if "program" in params)
    builds = Builds(programs, tmp_path_factory.mktemp("programs"))
    yield builds
    builds.close()


@pytest.fixture
def passes(builds) -> Callable[[Program], None]:
    """passes(program): builds and runs it."""
    return builds.run

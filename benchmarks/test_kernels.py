"""Each case by each implementation: one benchmark group a case, ours only when its error is within its budget.

`mmkernels bench` alternates the implementations and quotes ratios; use this one for pytest-benchmark's own
`--benchmark-compare` from commit to commit.
"""

from mmkernels.bench.gate import judge, plain_values
from mmkernels.bench.machine import synchronize
from mmkernels.bench.measure import Stopwatch
from mmkernels.bench.runner import contenders, prepare
from mmkernels.check.precision import exact_float32


def test_speed(benchmark, case, dtype, direction, which, request):
    device = request.config.getoption("device")
    benchmark.group = f"{case.op} {case.name} {dtype} {direction} {device}"
    with exact_float32():
        call, upstream, truth = prepare(case, dtype, device, seed=0)
        ours, eager, *others = contenders(case, call, upstream, direction)
        contender = {"ours": ours, "eager": eager, "last peer": (eager, *others)[-1]}[which]
        plain = plain_values(eager.run(), eager.function, call, case.op)
        worst = judge(contender.run(), plain, truth, call, case.op, contender.is_ours)
        benchmark.extra_info.update(impl=contender.name, error=worst.error, error_budget=worst.budget)
        assert not contender.is_ours or worst.failure() is None

        def timed():
            contender.run()
            synchronize(device)

        benchmark.pedantic(timed, setup=Stopwatch(device).sweep, rounds=5, warmup_rounds=1)

"""What is said of loops that are above their limits."""

from __future__ import annotations

import pytest
from events import Events
from limits import Row, complaints, rows_without_kernel
from loops import Way

ROW = Row("forward<*>", (1.0, 0.5))


def way(name: str = "plain", issue: int = 16, shared: int = 32, serialised: bool = False, spills: bool = False) -> Way:
    """Of 32 cycles of the tensor cores."""
    cycles = {"tensor": 32, "issue": issue, "fma": 0, "alu": 0, "mufu": 0, "shared": shared}
    return Way(name, "1230", cycles, Events("H!w1", 0, 0, serialised), spills)


def said_of(*ways: Way, rows: list[Row]) -> str:
    return "\n".join(complaints("forward<64>", ways, rows))


def test_nothing_is_said_at_the_limit():
    assert said_of(way(), rows=[ROW]) == ""
    assert said_of(way(serialised=True), rows=[Row("*", (1.0, 0.5), serialised=True, why="registers")]) == ""


@pytest.mark.parametrize(
    "ways, said",
    [
        ([way(issue=17)], "forward<64>: 0.531 instructions a tensor cycle are above 0.50"),
        ([way(shared=33)], "forward<64>: bound 1.031, by shared, is above 1.00"),
        (
            [way(shared=33)],
            "  plain at 1230: bound 1.031, issue 0.500; tensor 32, issue 16, fma 0",
        ),
        ([way(spills=True)], "forward<64>: spills"),
        ([way(serialised=True)], "forward<64>: waits for every product"),
        ([way(), way("masked")], "forward<64>: no limit for the loop 'masked'"),
        ([], "forward<64> has no loop 'plain' any more"),
    ],
)
def test_what_is_wrong_is_said_by_name_with_its_figures(ways, said):
    assert said in said_of(*ways, rows=[ROW])


@pytest.mark.parametrize("rows", [[], [ROW, Row("*64>", (1.0, 1.0))]])
def test_a_kernel_has_one_row(rows):
    assert f"{len(rows)} rows of limits fit forward<64>, which has\n  plain at 1230" in said_of(way(), rows=rows)


def test_a_row_has_a_kernel():
    assert rows_without_kernel([ROW, Row("backward<*>", (1.0, 1.0))], ["forward<64>"]) == ["no kernel is backward<*>"]


@pytest.mark.parametrize("limits", [{"masked": (1.21, 1.0)}, {"outer": [(1.0, 1.0), (1.3, 1.0)]}, {"serialised": True}])
def test_a_row_says_why_it_is_far_from_the_tensor_cores(limits):
    with pytest.raises(ValueError, match=r"say why forward<\*> is so far from what the tensor cores can do"):
        Row("forward<*>", (1.0, 0.5), **limits)
    Row("forward<*>", (1.0, 0.5), **limits, why="masks")


def test_the_last_limit_of_outer_loops_holds_for_what_is_more():
    row = Row("*", (1.0, 0.1), outer=[(1.0, 0.5), (1.0, 0.4)])
    assert [row.limits[f"outer {tile}"].issue for tile in (4096, 6144, 8192)] == [0.5, 0.4, 0.4]

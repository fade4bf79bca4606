"""What loops.py makes of machine code that was written by hand.

Of the instructions only what is looked at is as nvdisasm would have it. `WGMMA` is a product of 64 x 64 x 16: 32 cycles
of the tensor cores, 32 of shared memory.
"""

from __future__ import annotations

import pytest
from loops import Way, ways_of
from sass import Kernel, architecture_of

WGMMA = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"
LAST = WGMMA + ", gsb0"  # of its group
WAIT, WAIT_FOR_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXP, TANH = "MUFU.EX2 R0, R1", "MUFU.TANH R0, R1"
SELECTS = ["FSEL R0, R1, R2, P0"] * 8
FMA = "FFMA R0, R1, R2, R3"


def kernel_of(*lines: str, architecture: str = "sm_90a") -> Kernel:
    """Lines that end in a colon are labels."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            predicate, instruction = line.split(" ", 1) if line.startswith("@") else ("", line)
            text.append(f"        /*{address:04x}*/ {predicate:>14} {instruction} ;")
            address += 16
    return Kernel(architecture, "kernel", 0, 0, "\n".join(text))


def ways(*lines: str, architecture: str = "sm_90a") -> dict[str, Way]:
    return {way.name: way for way in ways_of(kernel_of(*lines, architecture=architecture))}


def loop(*body: str, label: str = ".L_x_1") -> list[str]:
    return [f"{label}:", *body, f"@P0 BRA `({label})"]


def test_a_loop_costs_what_its_instructions_do():
    body = [FMA, "IMAD R0, R1, R2, R3", "FMNMX R0, R1, R2, !PT", EXP, "LDS.64 R0, [R1]", "SHFL.BFLY PT, R0, R1, R2, R3"]
    found = ways("MOV R0, R1", *loop(*body, LAST, WAIT), "EXIT", "NOP")
    assert list(found) == ["plain"]
    assert found["plain"].cycles == {"tensor": 32, "issue": 9, "fma": 3, "alu": 2, "mufu": 8, "shared": 32 + 8 + 4}
    assert (found["plain"].address, found["plain"].busiest) == ("0010", "shared")
    assert found["plain"].bound == 44 / 32 and found["plain"].issue == 9 / 32


@pytest.mark.parametrize(
    "product, architecture, tensor, shared",
    [
        ("HGMMA.64x256x16.F32 R24, gdesc[UR4].tnspB, R24", "sm_90a", 128, 80),
        ("HGMMA.64x256x16.F32 R24, R184, gdesc[UR4].tnspB, R24", "sm_90a", 128, 64),  # left from registers
        ("HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24", "sm_90a", 32, 32),
        ("HMMA.16816.F32 R0, R4, R8, R0", "sm_80", 8, 0),
        ("HMMA.1688.F32.TF32 R0, R4, R8, R0", "sm_120", 8, 0),
    ],
)
def test_products(product, architecture, tensor, shared):
    cycles = ways(*loop(product), "EXIT", architecture=architecture)["plain"].cycles
    assert (cycles["tensor"], cycles["shared"]) == (tensor, shared)


def test_sm_80_takes_twice_as_long_for_a_multiply_add():
    body = loop("HMMA.16816.F32 R0, R4, R8, R0", FMA, "LDSM.16.M88.4 R0, [R1]")
    old, new = (ways(*body, architecture=architecture)["plain"].cycles for architecture in ("sm_80", "sm_90"))
    assert (old["fma"], new["fma"], old["shared"]) == (2, 1, 16)


def test_of_two_arms_one_is_taken():
    """The plain way is the cheapest, the masked one that which selects."""
    arms = ["@P1 BRA `(.L_x_2)", *[FMA] * 20, "BRA `(.L_x_3)", ".L_x_2:", *SELECTS, *[FMA] * 30, ".L_x_3:"]
    found = ways(*loop(LAST, *arms, WAIT), "EXIT")
    assert found["plain"].cycles["fma"] == 20 and found["plain"].cycles["alu"] == 0
    assert found["masked"].cycles["fma"] == 30 and found["masked"].cycles["alu"] == 16


@pytest.mark.parametrize("jump", ["@P1 BRA", "@!P1 BRA", "BRA P1,", "BRA.U !UP1,", "BRA.DIV ~URZ,"])
def test_a_jump_with_a_condition_has_two_ways(jump):
    found = ways(*loop(LAST, f"{jump} `(.L_x_2)", *[FMA] * 20, ".L_x_2:", WAIT), "EXIT")
    assert found["plain"].cycles["fma"] == 0


def test_a_jump_by_a_table_has_a_way_for_each():
    table = 'BRX R2 -0x50 (*"BRANCH_TARGETS .L_x_2,.L_x_3"*)'
    arms = [".L_x_2:", *[FMA] * 20, "BRA `(.L_x_4)", ".L_x_3:", *[FMA] * 10, ".L_x_4:"]
    assert ways(*loop(LAST, table, *arms, WAIT), "EXIT")["plain"].cycles["fma"] == 10


def test_the_way_that_multiplies_most_is_taken_even_if_another_is_cheaper():
    found = ways(*loop(WGMMA, "@P1 BRA `(.L_x_2)", LAST, *[FMA] * 9, ".L_x_2:", WAIT), "EXIT")
    assert found["plain"].cycles["tensor"] == 64 and found["plain"].cycles["fma"] == 9


def test_softcap_is_passed_by_where_a_mask_is_not():
    softcap = ["@P1 BRA `(.L_x_2)", TANH, *SELECTS, ".L_x_2:"]
    mask = ["@P2 BRA `(.L_x_3)", *SELECTS, ".L_x_3:"]
    found = ways(*loop(LAST, *softcap, *mask, WAIT), "EXIT")
    assert found["masked"].cycles["mufu"] == 0 and found["masked"].cycles["alu"] == 16


def test_a_reciprocal_that_every_way_takes_is_no_softcap():
    assert ways(*loop(LAST, "MUFU.RCP R0, R1", WAIT), "EXIT")["plain"].cycles["mufu"] == 8


def test_a_loop_that_waits_is_gone_through_once():
    waiting = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0", ".L_x_2:", FMA, "@!P1 BRA `(.L_x_2)"]
    found = ways(*loop(*waiting, LAST, WAIT), "EXIT")
    assert list(found) == ["plain"] and found["plain"].cycles["fma"] == 1


def test_what_jumps_back_need_not_be_a_loop():
    """Rare blocks stand behind the rest of a function."""
    aside = [".L_x_2:", *[FMA] * 5, "BRA `(.L_x_3)"]
    found = ways(*loop(LAST, "@P1 BRA `(.L_x_2)", ".L_x_3:", WAIT), "EXIT", *aside)
    assert list(found) == ["plain"] and found["plain"].cycles["fma"] == 0
    assert ways(LAST, "@P1 BRA `(.L_x_2)", ".L_x_3:", "EXIT", *aside) == {}


def test_ptxas_leaves_a_loop_by_a_call():
    """As for sm_80: the block behind is no part of the loop, and the one that calls is."""
    found = ways(".L_x_1:", LAST, "@P0 CALL.REL.NOINC `(.L_x_2)", "BRA `(.L_x_1)", ".L_x_2:", FMA, "EXIT")
    assert found["plain"].cycles["issue"] == 3


def test_an_outer_loop_has_so_many_rounds_inside_as_fill_its_tile():
    inner = loop(*[LAST] * 4, WAIT, FMA, label=".L_x_2")  # 128 cycles of the tensor cores
    found = ways(*loop(*[LAST] * 8, EXP, *inner, WAIT_FOR_ALL), "EXIT")  # 256, and the rest inside
    assert list(found) == ["plain", "outer 4096", "outer 6144", "outer 8192"]
    rounds = (4096 - 256) / 128
    expected = {"tensor": 4096, "issue": 8 + 3 + 7 * rounds, "fma": rounds, "alu": 0, "mufu": 8, "shared": 4096}
    assert found["outer 4096"].cycles == expected
    assert found["outer 8192"].cycles["fma"] == (8192 - 256) / 128


def test_loops_after_each_other_are_numbered():
    assert list(ways(*loop(LAST, WAIT), *loop(LAST, LAST, WAIT, label=".L_x_2"), "EXIT")) == ["plain", "plain 2"]


def test_exponentials_before_the_wait_are_hidden():
    """A product of the round before is under way at the beginning of each."""
    early = ways(*loop(EXP, EXP, WAIT_FOR_ALL, WGMMA, LAST), "EXIT")["plain"].events
    late = ways(*loop(EXP, WAIT_FOR_ALL, EXP, WGMMA, LAST), "EXIT")["plain"].events
    assert (early.order, early.hidden, early.exponentials) == ("e2w0H2!", 2, 2)
    assert (late.order, late.hidden, late.exponentials) == ("ew0eH2!", 1, 2)


def test_a_wait_leaves_groups_under_way():
    events = ways(*loop(LAST, LAST, WAIT, EXP, WAIT_FOR_ALL, EXP), "EXIT")["plain"].events
    assert (events.order, events.hidden) == ("H!H!w1ew0e", 1)


@pytest.mark.parametrize(
    "products, order, serialised",
    [([LAST, WAIT_FOR_ALL] * 4, "(H!w0)4", True), ([WGMMA, WGMMA, LAST, WAIT_FOR_ALL], "H3!w0", False)],
)
def test_products_that_are_waited_for_by_themselves_are_serialised(products, order, serialised):
    events = ways(*loop(*products), "EXIT")["plain"].events
    assert (events.order, events.serialised) == (order, serialised)


def test_a_spill_is_seen_on_the_way_alone():
    assert ways(*loop(LAST, "STL [R1], R0", WAIT), "EXIT")["plain"].spills
    assert not ways("STL [R1], R0", *loop(LAST, WAIT), "EXIT")["plain"].spills


def test_a_kernel_that_multiplies_in_no_loop_has_no_ways():
    assert ways(LAST, *loop(FMA), "EXIT") == {}


def test_names_are_shortened_and_architectures_read_in_both_formats():
    name = "void mmk::cuda::(anonymous namespace)::grads_kernel<__half, mmk::Pass<__half, (mmk::Same)0> >(mmk::Call)"
    assert Kernel("sm_90a", name, 0, 0, "").short_name == "grads_kernel<__half, Pass<__half, (Same)0>>"
    assert Kernel("sm_90a", "forward", 0, 0, "").short_name == "forward"
    assert architecture_of("\t.target\tsm_90a\n") == "sm_90a"
    flags = "EF_CUDA_64BIT_ADDRESS EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
    assert architecture_of(f'\t.headerflags\t@"{flags}"\n') == "sm_90a"
    assert architecture_of(f'\t.headerflags\t@"{flags.replace(" EF_CUDA_ACCELERATORS", "")}"\n') == "sm_90"

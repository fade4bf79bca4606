"""Each kind of bug that the emulator claims to report, planted: the builds that see it say so, and where; the corrected
twin, which differs in nothing else, passes in all three."""

import re

import pytest

EVERY = ("plain", "asan", "race")
# What each bug is reported as, and by which builds. Where there is no rule for it, the poison shows as NaN.
PLANTED = {
    "missing_syncthreads": {"race": "uninitialised shared|RACE", "plain": "NaN", "asan": "NaN"},
    "missing_syncwarp": {"race": "uninitialised shared|RACE", "plain": "NaN", "asan": "NaN"},
    "write_after_read": {"race": "RACE"},
    "warps_race_through_static_shared": {"race": "RACE: read of shared memory"},
    "uninitialised_shared": {"race": "read of uninitialised shared", "plain": "NaN", "asan": "NaN"},
    "uninitialised_register": dict.fromkeys(EVERY, "NaN"),
    "divergent_barrier": dict.fromkeys(EVERY, "deadlock: thread 0 waits in __syncthreads"),
    "two_barriers": dict.fromkeys(EVERY, "divergent __syncthreads"),
    "named_barrier_counts": dict.fromkeys(EVERY, "deadlock: thread 64 waits in a named barrier"),
    "named_barrier_left_over": dict.fromkeys(EVERY, "barrier 1 has 64 arrivals left"),
    "named_barrier_part_of_a_warp": dict.fromkeys(EVERY, "100 threads: not a number of whole warps"),
    "shuffle_without_a_lane": dict.fromkeys(EVERY, "deadlock: thread 0 waits in a shuffle"),
    "shuffle_from_outside": dict.fromkeys(EVERY, "not in the mask 0000ffff"),
    "shuffle_of_another_mask": dict.fromkeys(EVERY, "deadlock: thread 16 waits in a shuffle"),
    "mma_in_a_branch": dict.fromkeys(EVERY, "deadlock: thread 0 waits in mma"),
    "elect_in_a_branch": dict.fromkeys(EVERY, "deadlock: thread 0 waits in a vote"),
    "copy_without_wait": {"race": "a wait is missing", "plain": "NaN", "asan": "NaN"},
    "wait_too_weak": {"race": "a wait is missing", "plain": "NaN", "asan": "NaN"},
    "commit_too_late": {"race": "a wait is missing", "plain": "NaN", "asan": "NaN"},
    "wait_without_barrier": {"race": "a wait is missing|RACE|uninitialised", "plain": "NaN", "asan": "NaN"},
    "copy_into_a_live_buffer": {"race": "RACE"},
    "copy_never_waited_for": dict.fromkeys(EVERY, "cp.async in flight"),
    "copy_never_committed": dict.fromkeys(EVERY, "never committed"),
    "misaligned_copy": dict.fromkeys(EVERY, "cp.async: address misaligned"),
    "misaligned_ldmatrix": dict.fromkeys(EVERY, "ldmatrix: address misaligned"),
    "shared_overrun": {"race": "outside shared memory, at offset 4096", "asan": "use-after-poison"},
    "static_shared_overrun": {"race": "runs out of 512 bytes of shared|outside shared memory", "asan": "poison"},
    "copy_overruns_shared": dict.fromkeys(EVERY, "16 bytes at offset 4096 of 4096 bytes"),
    "global_read_overrun": {"race": "outside every watched tensor", "asan": "heap-buffer-overflow"},
    "global_write_overrun": {"race": "outside every watched tensor", "asan": "heap-buffer-overflow"},
    "copy_reads_outside": {"race": "outside every watched tensor", "asan": "heap-buffer-overflow"},
    "register_array_overrun": {"asan": "stack-buffer-overflow|out of bounds"},
    "misaligned_vector": {"asan": "misaligned address"},
    "blocks_collide": {"race": "RACE: write to global memory at offset 508.*of another block"},
    "read_of_another_block": {"race": "RACE: read of global memory at offset 0.*of another block"},
    "bulk_copy_without_wait": {"race": "a wait is missing|uninitialised shared", "plain": "NaN", "asan": "NaN"},
    "wrong_parity": {"race": "a wait is missing|uninitialised shared", "plain": "NaN", "asan": "NaN"},
    "wrong_parity_of_the_second_phase": {"race": "a wait is missing|RACE", "plain": "NaN", "asan": "NaN"},
    "wrong_byte_count": dict.fromkeys(EVERY, "deadlock: thread 0 waits in a wait for an mbarrier"),
    "arrival_missing": dict.fromkeys(EVERY, "deadlock: thread 0 waits in a wait for an mbarrier"),
    "no_init_fence": dict.fromkeys(EVERY, "no fence.mbarrier_init"),
    "no_sync_after_init": {"race": "whose init is not ordered before it"},
    "mbarrier_does_not_order": {"race": "RACE|uninitialised"},
    "arrivals_too_few": {"race": "RACE|uninitialised"},
    "copy_that_another_warp_waited_for": {"race": "RACE: read of .* unordered with a copy to it|a wait is missing"},
    "bulk_copy_in_flight_at_the_end": dict.fromkeys(EVERY, "block ends with a bulk copy in flight"),
    "bulk_copy_over_unfenced_stores": {"race": "written by the async proxy: no fence.proxy.async"},
    "tile_off_its_alignment": dict.fromkeys(EVERY, "tensor copy: address misaligned"),
    "store_without_proxy_fence": {"race": "read by the async proxy: no fence.proxy.async"},
    "overwritten_while_stored": {"race": "while a bulk store reads it", "plain": "NaN", "asan": "NaN"},
    "store_never_waited_for": dict.fromkeys(EVERY, "ends while its bulk store reads shared memory"),
    "bad_register_count": dict.fromkeys(EVERY, "setmaxnreg: 20"),
    "wgmma_without_fence": dict.fromkeys(EVERY, "no wgmma.fence"),
    "wgmma_without_proxy_fence": {"race": "no fence.proxy.async"},
    "wgmma_without_wait": dict.fromkeys(EVERY, "NaN"),
    "wgmma_wait_too_weak": dict.fromkeys(EVERY, "names an accumulator that a product is still adding to"),
    "wait_does_not_name_the_accumulator": dict.fromkeys(EVERY, "NaN"),
    "accumulator_written_in_flight": dict.fromkeys(EVERY, "its accumulator was written while a product"),
    "wgmma_in_flight_at_the_end": dict.fromkeys(EVERY, "ends with a wgmma in flight"),
    "wgmma_by_three_warps": dict.fromkeys(EVERY, "deadlock: thread 0 waits in an operation of the warpgroup"),
    "operand_off_its_swizzle": dict.fromkeys(EVERY, "does not lie on a repeat of its swizzle"),
    "operand_outside_shared_memory": dict.fromkeys(EVERY, "wgmma: 16 bytes at offset 4096 of 4096"),
    "operand_released_by_one_warp": {"race": "RACE: write to shared memory at offset 0, unordered with a read"},
    "cluster_not_ready": {"race": "copy on an mbarrier whose init is not ordered before it|not initialised"},
    "live_in_the_other_block": {"race": "a wait is missing|RACE: write to shared memory at offset 0"},
    "bytes_of_the_other_block": {"race": "a wait is missing|uninitialised", "plain": "in flight", "asan": "in flight"},
    "left_the_cluster": dict.fromkeys(EVERY, "block 1 of the cluster has ended"),
    "numbers_of_the_other_block": {"race": "RACE: read of shared memory at offset|uninitialised"},
    "outside_the_cluster": dict.fromkeys(EVERY, "block 2 of a cluster of 2"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_reported(run, build, name):
    good = run(["planted.cu"], name, "good")
    assert (good.returncode, good.stdout) == (0, "nothing\n"), good.stdout + good.stderr
    if build not in PLANTED[name]:
        return
    bug = run(["planted.cu"], name, "bug")
    report = bug.stdout + bug.stderr
    assert re.search(PLANTED[name][build], report), report
    if not report.startswith(("NaN", "deadlock", "barrier")):  # which are no single place's
        assert "planted.cu:" in report or "SUMMARY" in report, report

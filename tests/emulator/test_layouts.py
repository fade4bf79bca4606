"""What each primitive moves where, against tables that share no line with the emulator."""


def test_every_primitive_follows_its_table(run, seed):
    ran = run(["layouts.cu"], str(seed))
    assert ran.returncode == 0 and ran.stdout == "right\n", ran.stdout + ran.stderr

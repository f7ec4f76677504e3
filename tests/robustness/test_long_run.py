"""Memory and file handles over many meta-steps of a tiny model."""

import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [100, pytest.param(20_000, marks=[pytest.mark.trust])])
def test_memory_does_not_grow_and_no_file_handle_is_left(steps):
    from speed.long_run import LIMIT_MIB, long_run

    record = long_run(steps, "functional")
    print(record)
    assert record["growth_mib"] < LIMIT_MIB
    assert record["leaked_files"] == 0
    assert record["drift"] > 0

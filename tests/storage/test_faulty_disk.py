"""A disk that fails at any of its operations: the run goes on to the same bits, or says in one line why not."""

from __future__ import annotations

import pytest

from tests.faulty_disk import KINDS
from tests.one_run import operations, outcome, survived

SAMPLE = 60


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    disk = operations(output)
    return disk, outcome(output / "run")


def test_operations_of_every_sort_are_seen(undisturbed):
    disk, _ = undisturbed
    seen = {name.split()[0] for name in disk.names}
    assert {"open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "save", "serialize_file"} <= seen
    assert disk.count > 100


@pytest.mark.parametrize("part", range(6))
def test_a_run_survives_a_fault_at_a_sample_of_its_operations(undisturbed, tmp_path, part):
    disk, expected = undisturbed
    for number in range(part, SAMPLE, 6):
        fail_at = 1 + (disk.count - 1) * number // (SAMPLE - 1)
        said = survived(tmp_path / "runs", fail_at, KINDS[number % 3], expected)
        assert said == "same bits", (disk.names[fail_at - 1], KINDS[number % 3], said)

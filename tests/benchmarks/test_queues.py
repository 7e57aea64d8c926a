"""Every queue file that is kept here can be run."""

from fanformer.comparison.queue import read_queue


def test_every_queue_is_read_without_an_error_and_no_two_comparisons_have_one_name(repository):
    paths = sorted((repository / "benchmarks" / "queues").glob("*.yaml"))
    entries = [entry for path in paths for entry in read_queue(path).entries]
    assert {entry.name: entry.error for entry in entries if entry.error is not None} == {}
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names) > 5

"""The journal of a run whose jobs write parts of files."""
from array import array

import pytest

from stream_reshard.destination import journal
from stream_reshard.destination.journal import Journal, Record, Written, read_done
from stream_reshard.errors import DestinationError
from stream_reshard.storage.folder import Access, Folder

CRCS = {job: array("I", [2**32 - 1 - job] * 100) for job in range(50)}


def written_in(tmp_path, max_crcs):
    """What a journal of these CRC-32 is read back as, by a run that may have so many."""
    record = Record({"plan_sha256": "0"}, "config.json", [], 0, max_crcs)
    Journal(Folder(tmp_path, Access()), record, Written(crcs=CRCS)).close()
    return read_done(tmp_path, record)


def test_a_journal_may_be_as_long_as_its_run_has_tensors(tmp_path, monkeypatch):
    """A training on thousands of ranks has millions of them in few files."""
    monkeypatch.setattr(journal, "MAX_FIRST_LINE_NBYTES", 2**12)
    assert written_in(tmp_path, 5000).crcs == CRCS
    with pytest.raises(DestinationError, match="longer than any journal of this run"):
        written_in(tmp_path, 50)

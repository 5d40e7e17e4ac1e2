"""The append log: what a killed process, a full disk or a flipped byte can do to it."""

import shutil
from pathlib import Path

import pytest

from sgpo_cli.errors import IntegrityError
from sgpo_cli.journal import Journal

RECORDS = [{"rows": [[{"text": f"row {n} — with \u2028 and \n in it"}, None]]} for n in range(4)]


def filled(directory: Path) -> Path:
    journal = Journal(directory)
    for number, record in enumerate(RECORDS):
        journal.append(number, record)
    journal.close()
    return directory / "rank-0000.jsonl"


def test_records_come_back_in_order_of_batch(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in (2, 0, 1):
        journal.append(number, RECORDS[number])
    assert [record["batch"] for record in journal] == [0, 1, 2]
    assert next(iter(journal))["rows"] == RECORDS[0]["rows"]
    journal.close()


def test_a_record_torn_at_any_byte_is_cut_and_the_others_stay(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole").read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for length in range(last, len(whole)):
        directory = tmp_path / "torn"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / "rank-0000.jsonl").write_bytes(whole[:length])
        journal = Journal(directory)
        assert [record["batch"] for record in journal] == [0, 1, 2]
        journal.append(3, RECORDS[3])
        journal.close()
        assert (directory / "rank-0000.jsonl").read_bytes() == whole


def test_every_flipped_byte_before_the_last_record_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    start, end = len(lines[0]) + 1, len(lines[0]) + len(lines[1]) + 1
    for place in range(start, end):
        damaged = bytearray(whole)
        damaged[place] ^= 0x20
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="byte"):
            Journal(tmp_path)


def test_another_ranks_log_is_read_and_not_written(tmp_path: Path) -> None:
    theirs = filled(tmp_path)
    before = theirs.read_bytes()
    journal = Journal(tmp_path, rank=1)
    assert 2 in journal
    journal.append(7, RECORDS[0])
    journal.close()
    assert theirs.read_bytes() == before
    assert len(Journal(tmp_path)) == 5

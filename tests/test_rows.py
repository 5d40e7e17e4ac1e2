"""The strict reader: 40+ ways to be malformed, oddities that are fine, and what the rows look like."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_cli.control_tokens import added_tokens, control_tokens
from sgpo_cli.errors import IncompleteError, IntegrityError, SgpoError, UsageError
from sgpo_cli.readers import sources
from sgpo_cli.rows import Columns, Rows, read_rows

PAIR = ("prompt", "reference")
GOOD = b'{"prompt": "Why?", "completion": "Because."}\n'


def write(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def row(**changes: Any) -> bytes:
    return json.dumps({"prompt": "Why?", "completion": "Because.", **changes}).encode() + b"\n"


def chat(*turns: tuple[str, Any]) -> bytes:
    return lines({"messages": [{"role": role, "content": content} for role, content in turns]})


def deep(levels: int) -> bytes:
    return b'{"prompt": "p", "completion": "c", "x": ' + b"[" * levels + b"]" * levels + b"}\n"


# (reason, the bad second line of a .jsonl file, the column at fault, a part of the message)
BAD_LINES = [
    ("null", row(prompt=None), "prompt", "null"),
    ("wrong_type", row(prompt=12), "prompt", "got int (12)"),
    ("wrong_type", row(prompt={"a": 1}), "prompt", "got dict"),
    ("wrong_type", row(completion=True), "completion", "got bool"),
    ("empty_prompt", row(prompt=""), "prompt", "empty"),
    ("empty_prompt", row(prompt=" \n\t "), "prompt", "empty"),
    ("empty_prompt", row(prompt="\u200b\ufeff\u2060"), "prompt", r"'\u200b\ufeff\u2060'"),
    ("empty_reference", row(completion="\u3164"), "completion", "empty"),
    ("missing_column", b'{"completion": "c"}\n', "prompt", "missing"),
    ("missing_column", b'{"prompt": "p"}\n', "reference", "missing"),
    ("mixed_schema", row(prompt=[{"role": "user", "content": "Why?"}]), "prompt", "d.jsonl:1"),
    ("mixed_schema", chat(("user", "Why?"), ("assistant", "So.")), "messages", "d.jsonl:1"),
    ("mixed_schema", row(id="b"), "id", "d.jsonl:1"),
    ("bad_messages", row(completion=[{"role": "user", "content": "x"}]), "completion", "one assistant"),
    ("not_utf8", b'{"prompt": "\xe9", "completion": "c"}\n', "", "byte 57 of the file"),
    ("not_utf8", b'{"prompt": "\xed\xa0\x80", "completion": "c"}\n', "", "byte 57 of the file"),
    ("lone_surrogate", b'{"prompt": "a\\ud800", "completion": "c"}\n', "prompt", r"'a\ud800'"),
    ("lone_surrogate", b'{"prompt": "p", "completion": "c", "x": {"\\udc00": 1}}\n', "x", r"\udc00"),
    ("nul_byte", b'{"prompt": "a\0", "completion": "c"}\n', "", "byte 58 of the file"),
    ("control_character", b'{"prompt": "a\x1b[2J", "completion": "c"}\n', "", "0x1b at byte 58"),
    ("control_character", row(prompt="a\0b"), "prompt", r"'\x00' at character 2"),
    ("control_character", row(completion="a\x1b]0;x\x07"), "completion", r"'\x1b'"),
    ("bad_number", b'{"prompt": "p", "completion": "c", "x": NaN}\n', "", "NaN"),
    ("bad_number", b'{"prompt": "p", "completion": "c", "x": -Infinity}\n', "", "-Infinity"),
    ("bad_number", b'{"prompt": "p", "completion": "c", "x": 1e999}\n', "", "1e999"),
    ("bad_number", b'{"prompt": "p", "completion": "c", "x": ' + b"9" * 5000 + b"}\n", "", "64 bits"),
    ("duplicate_key", b'{"prompt": "p", "prompt": "q", "completion": "c"}\n', "prompt", "twice"),
    ("duplicate_key", b'{"prompt": "p", "completion": "c", "x": {"y": 1, "y": 2}}\n', "y", "twice"),
    ("bad_json", b'{"prompt": "p", "completion": "c"\n', "", "not valid JSON"),
    ("bad_json", GOOD.strip() + GOOD, "", "Extra data"),
    ("bad_json", b"{'prompt': 'p'}\n", "", "not valid JSON"),
    ("torn_line", b'{"prompt": "p", "compl', "", "cut off"),
    ("not_an_object", b'["p", "c"]\n', "", "expected an object"),
    ("not_an_object", b"null\n", "", "got None"),
    ("too_long", row(prompt="x" * (1 << 20)), "", "1048576"),
    ("too_deep", deep(100), "x", "64 levels"),
    ("too_deep", deep(100_000), "", "64 levels"),
]

# The same for conversations.
BAD_CHATS = [
    ("bad_role", chat(("human", "Why?"), ("assistant", "So.")), "message 1: role", "not 'human'"),
    ("bad_role", lines({"messages": [{"content": "x"}]}), "message 1: role", "not None"),
    ("wrong_type", chat(("user", None), ("assistant", "So.")), "message 1", "got null"),
    ("wrong_type", lines({"messages": "Why?"}), "expected a list of messages", "got str"),
    ("bad_messages", lines({"messages": ["Why?"]}), "message 1", "role and content"),
    ("empty_prompt", lines({"messages": []}), "the list", "empty"),
    ("empty_prompt", chat(("user", " "), ("assistant", "So.")), "message 1", "empty"),
    ("empty_turn", chat(("user", "Why?"), ("assistant", "")), "message 2", "empty"),
    ("bad_turns", chat(("assistant", "So.")), "message 1", "expected user"),
    ("bad_turns", chat(("user", "a"), ("user", "b"), ("assistant", "c")), "message 2", "expected assistant"),
    ("bad_turns", chat(("user", "a"), ("system", "b"), ("user", "c")), "message 2 is of system", "take turns"),
    ("bad_turns", chat(("system", "a")), "must end with a user turn", "system"),
    ("no_reference", chat(("user", "Why?")), "ends with a user turn", "reference"),
    ("extra_key", lines({"messages": [{"role": "user", "content": "x", "name": "Al"}]}), "'name'", "message 1"),
]


@pytest.mark.parametrize(
    ("reason", "line", "column", "says"), BAD_LINES, ids=[f"{c[0]}-{i}" for i, c in enumerate(BAD_LINES)]
)
def test_a_bad_line_is_named_with_file_row_and_column(
    tmp_path: Path, reason: str, line: bytes, column: str, says: str
) -> None:
    source = write(tmp_path, "d.jsonl", GOOD + line)
    with pytest.raises(UsageError) as caught:
        read_rows(source, PAIR)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{source}:2 column '{column}': " if column else f"{source}:2: ")
    assert says in first
    assert first.isprintable()
    assert len(first) < len(source) * 2 + 250
    assert caught.value.exit_code == 2
    assert "--on-bad-row reject" in caught.value.hint

    rows = read_rows(source, PAIR, on_bad_row="reject", max_reject_share=0.5)
    assert [(bad.index, bad.reason, bad.column) for bad in rows.rejected] == [(1, reason, column)]
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("reason", "line", "says", "also"), BAD_CHATS, ids=[f"{c[0]}-{i}" for i, c in enumerate(BAD_CHATS)]
)
def test_a_bad_conversation_is_named_down_to_its_message(
    tmp_path: Path, reason: str, line: bytes, says: str, also: str
) -> None:
    source = write(tmp_path, "d.jsonl", chat(("user", "Why?"), ("assistant", "So.")) + line)
    with pytest.raises(UsageError) as caught:
        read_rows(source, PAIR)
    assert str(caught.value).startswith(f"{source}:2 column 'messages': ")
    assert says in str(caught.value)
    assert also in str(caught.value)
    rejected = read_rows(source, PAIR, on_bad_row="reject", max_reject_share=0.5).rejected
    assert [bad.reason for bad in rejected] == [reason]


# (file name, content, where the message points to, a part of the message)
BAD_FILES = [
    ("d.jsonl", b"", "", "is empty"),
    ("d.jsonl", b"\n \r\n\n", "", "no rows"),
    ("d.jsonl", b"\xef\xbb\xbf", "", "no rows"),
    ("d.jsonl", b'[{"prompt": "p"}]\n', ":1", "JSON array"),
    ("d.jsonl", gzip.compress(GOOD), "", "gzip"),
    ("d.jsonl", "x".encode("utf-16"), "", "UTF-16"),
    ("d.jsonl", b"PAR1....PAR1", "", "a Parquet file"),
    ("d.jsonl", lines({"instruction": "p", "output": "c"}), ":1 column 'prompt'", "'instruction', 'output'"),
    ("d.jsonl", lines({"prompt": "p", "answer": "c"}), ":1 column 'reference'", "'prompt', 'answer'"),
    ("d.txt", GOOD, "", "unknown kind of file '.txt'"),
    ("d.jsonl.gz", gzip.compress(GOOD), "", "unknown kind of file '.gz'"),
    ("d.json", b" \n", "", "no rows"),
    ("d.json", b"[]", "", "no rows"),
    ("d.json", b'[{"prompt": "p", "completion": "c"}', ":1", "cut off"),
    ("d.json", b'[\n{"prompt": "p", "completion": "c"},\n{"prompt"]', ":2", "line 3"),
    ("d.json", b'[{"prompt": "p", "completion": "c"}] x', ":1", "after the end"),
    ("d.json", b'[{"prompt": "p", "completion": "c"},]', ":2", "not valid JSON"),
    ("d.json", b'[{"prompt": "p\xff"}]', ":1", "not UTF-8 at byte 14"),
    ("d.json", b'[{"prompt": "p", "completion": "c"}, {"prompt": 1, "completion": "c"}]', ":2 column 'prompt'", "int"),
    ("d.json", b'[{"prompt": "p", "prompt": "c"}]', ":1 column 'prompt'", "twice"),
    ("d.json", b'[{"prompt": "\x01"}]', ":1", "control character"),
    ("d.json", b"[" * 100_000, ":1", "deep"),
    ("d.csv", b"", "", "is empty"),
    ("d.csv", b"prompt,completion\n", "", "no rows"),
    ("d.csv", b"Why?,Because.\nHow?,So.\n", ":2 column 'prompt'", "'Why?', 'Because.'"),
    ("d.csv", b"prompt,prompt\na,b\n", ":1 column 'prompt'", "twice"),
    ("d.csv", b"prompt,completion\na,b\nc\n", ":3", "1 fields, the header has 2"),
    ("d.csv", b"prompt,completion\na,b,c\n", ":2", "3 fields"),
    ("d.csv", b'prompt,completion\n"a\nb",c\n"d,e\n', ":4", "quote left open"),
    ("d.csv", b'prompt,completion\n"a"b,c\n', ":2", "not valid CSV"),
    ("d.csv", b"prompt,completion\n\xe4,c\n", ":2", "not UTF-8 at byte 18"),
    ("d.csv", b"prompt,completion\na,\n", ":2 column 'completion'", "empty"),
    ("d.csv", b'prompt,completion\na,b\n"' + b"x" * (2 << 20), ":3", "at most 1048576"),
    ("d.parquet", b"", "", "is empty"),
    ("d.parquet", GOOD, "", "not a readable Parquet file"),
    ("d.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "", "not a readable Parquet file"),
]


@pytest.mark.parametrize(
    ("name", "content", "where", "says"), BAD_FILES, ids=[f"{c[0]}-{i}" for i, c in enumerate(BAD_FILES)]
)
def test_a_bad_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, where: str, says: str) -> None:
    source = write(tmp_path, name, content)
    with pytest.raises(UsageError) as caught:
        read_rows(source, PAIR)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{source}{where}: ")
    assert says in first
    assert caught.value.hint


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", GOOD)
    with pytest.raises(UsageError, match=r"trian\.jsonl: no such file or directory") as caught:
        read_rows(str(tmp_path / "trian.jsonl"), PAIR)
    assert caught.value.hint == f"did you mean {tmp_path / 'train.jsonl'}?"


@pytest.mark.parametrize(
    "source", ["./nope", "~/nope", "a/b/c", "nope.csv", "", "a b", "x\0y", "x" * 5000 + "/", "../x"]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load_hub_table", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(UsageError, match="no such file or directory"):
        read_rows(source, PAIR)


def test_a_directory_is_read_through_its_one_data_file(tmp_path: Path) -> None:
    write(tmp_path, "step/rejects.jsonl", b"{}\n")
    with pytest.raises(UsageError, match=r"step: no train\.jsonl .*rejects\.jsonl"):
        read_rows(str(tmp_path / "step"), PAIR)
    write(tmp_path, "step/train.csv", b"prompt,completion\nHow?,So.\n")
    assert read_rows(str(tmp_path / "step"), PAIR)[0]["reference"] == "So."
    write(tmp_path, "step/train.json", b"[]")
    with pytest.raises(UsageError, match=r"more than one data file: train\.csv, train\.json"):
        read_rows(str(tmp_path / "step"), PAIR)
    # A stage's own output comes before all others.
    write(tmp_path, "step/train.jsonl", GOOD)
    rows = read_rows(str(tmp_path / "step"), PAIR)
    assert rows.source == str(tmp_path / "step" / "train.jsonl")
    write(tmp_path, "step/test.jsonl", lines({"prompt": "Who?", "completion": "Me."}))
    assert read_rows(str(tmp_path / "step"), PAIR, split="test")[0]["reference"] == "Me."


def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(UsageError, match="not a regular file"):
        read_rows(str(tmp_path / "d.jsonl"), PAIR)


ODD = {
    "bom": b"\xef\xbb\xbf" + GOOD,
    "crlf": GOOD.replace(b"\n", b"\r\n"),
    "blank lines": b"\n\r\n" + GOOD + b"  \n\n",
    "no final newline": GOOD.strip(),
    "spaces around": b"  " + GOOD.strip() + b" \t\n",
}


@pytest.mark.parametrize("oddity", ODD)
def test_oddities_of_editors_change_nothing(tmp_path: Path, oddity: str) -> None:
    plain = list(read_rows(write(tmp_path, "plain.jsonl", GOOD), PAIR))
    rows = read_rows(write(tmp_path, "odd.jsonl", ODD[oddity]), PAIR)
    assert list(rows) == plain
    assert bool(rows.notes) == (oddity == "bom")


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": 'a "b",\n\u2028c', "completion": "d\r\ne\u0085"}, {"prompt": "ä🎉", "completion": "=1"}]
    write(tmp_path, "d.jsonl", lines(*rows))
    write(tmp_path, "d.json", json.dumps(rows, indent=2).encode())
    write(tmp_path, "lines.json", b"\n" + lines(*rows))
    quoted = [",".join('"' + row[key].replace('"', '""') + '"' for key in row) for row in rows]
    write(tmp_path, "d.csv", ("\ufeffprompt,completion\r\n" + "\r\n".join(quoted)).encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    expected = [([{"role": "user", "content": row["prompt"]}], row["completion"]) for row in rows]
    for name in ("d.jsonl", "d.json", "lines.json", "d.csv", "d.parquet"):
        found = read_rows(str(tmp_path / name), PAIR)
        assert [(row["prompt"], row["reference"]) for row in found] == expected, name
        assert list(found) == list(read_rows(str(tmp_path / "d.jsonl"), PAIR)), name
        assert len(read_rows(str(tmp_path / name), PAIR, max_rows=1)) == 1, name


def test_parquet_leaves_out_what_json_cannot_say_and_refuses_nan(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt": "p", "response": "r", "x": 0.5, "at": date(2025, 1, 1), "turns": [{"a": 1}]},
        {"prompt": "q", "response": "r", "x": float("nan"), "at": None, "turns": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = read_rows(str(tmp_path / "d.parquet"), PAIR, on_bad_row="reject", max_reject_share=0.5)
    assert "column 'at' is left out" in found.notes[0]
    assert set(found[0]) == {"id", "prompt", "reference", "x", "turns"}
    assert str(found.rejected[0]) == f"{tmp_path / 'd.parquet'}:2 column 'x': nan is not a JSON number"


def test_messages_in_parquet_lose_the_nulls_that_arrow_adds(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [{"role": "user", "content": "Why?", "name": None}, {"role": "assistant", "content": "So."}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "d.parquet")
    (found,) = read_rows(str(tmp_path / "d.parquet"), PAIR)
    assert found["prompt"] == [{"role": "user", "content": "Why?"}]
    assert found["reference"] == "So."


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_text_comes_back_byte_for_byte(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("round")
    good = [f"x{text}" for text in texts if not set(text) & set(map(chr, range(32))) - set("\t\r\n")]
    if not good:
        return
    for ascii_only in (True, False):
        content = "".join(json.dumps({"prompt": text}, ensure_ascii=ascii_only) + "\n" for text in good)
        found = read_rows(write(folder, "d.jsonl", content.encode()), ["prompt"])
        assert [row["prompt"][0]["content"] for row in found] == good


def test_no_damage_escapes_as_anything_but_our_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    messages = []
    turns = [{"role": "user", "content": "W\\u00e4\u00e9?"}, {"role": "assistant", "content": 'B,"c"'}]
    whole = lines({"messages": turns, "x": [1.5, {"y": None}]}) * 3
    contents = {
        "d.jsonl": whole,
        "d.json": b"[" + whole.replace(b"\n", b",\n")[:-2] + b"]",
        "d.csv": b'prompt,completion\r\n"a ""b""\n",c\r\nd,e\r\n',
    }
    for name, content in contents.items():
        for _ in range(100):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(damaged))
                damaged[at : at + rng.randint(0, 3)] = rng.choice(
                    [b"", b'"', b"\0", b"\n", b"[", b"\\ud800", b"\xff", b"\r"]
                )
            try:
                for found in read_rows(write(tmp_path, name, bytes(damaged)), PAIR):
                    json.dumps(found, ensure_ascii=False).encode()
            except UsageError as error:
                messages.append((name, str(error)))
    assert len(messages) > 100
    for name, message in messages:
        assert message.startswith(str(tmp_path / name))
        assert all(line.isprintable() for line in message.splitlines())


# --- what a row looks like ---------------------------------------------------------------------------


def one(tmp_path: Path, raw: dict[str, Any], *needs: str, **options: Any) -> dict[str, Any]:
    (found,) = read_rows(write(tmp_path, "one.jsonl", lines(raw)), needs, **options)
    return found


def test_the_reference_has_four_places_in_order(tmp_path: Path) -> None:
    everything = {"prompt": "p", "reference": "1", "completion": "2", "response": "3"}
    assert one(tmp_path, everything, *PAIR)["reference"] == "1"
    assert one(tmp_path, {**everything, "reference": None}, *PAIR)["reference"] == "2"
    assert one(tmp_path, {"prompt": "p", "response": "3"}, *PAIR)["reference"] == "3"
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "4"}]
    assert one(tmp_path, {"messages": turns}, *PAIR)["reference"] == "4"
    # UltraChat's shape: the first prompt beside the conversation that it opened.
    both = one(tmp_path, {"prompt": "p", "messages": [*turns, *turns]}, *PAIR)
    assert [turn["content"] for turn in both["prompt"]] == ["p", "4", "p"]
    # The policy's response never stands in for the data set's reference once both have a meaning.
    with pytest.raises(UsageError, match="column 'reference'"):
        one(tmp_path, {"prompt": "p", "response": "3"}, *PAIR, "response")


def test_a_trailing_answer_is_cut_off_when_only_prompts_are_needed(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "p"}]
    answered = [*turns, {"role": "assistant", "content": "r"}]
    for messages in (turns, answered):
        assert one(tmp_path, {"messages": messages}, "prompt").keys() == {"id", "prompt"}
        assert one(tmp_path, {"messages": messages}, "prompt")["prompt"] == turns


def test_pairs_are_messages_and_targets_are_text(tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "good"}]
    raw = {"prompt": "p", "response": "meh", "target": answer, "chosen": "good", "rejected": answer, "score": 0.25}
    found = one(tmp_path, raw, "prompt", "response", "target", "chosen", "rejected")
    assert found["target"] == "good"
    assert found["chosen"] == found["rejected"] == answer
    assert list(found) == ["id", "prompt", "response", "target", "chosen", "rejected", "score"]


def test_named_columns_are_read_and_never_shadowed(tmp_path: Path) -> None:
    raw = {"uid": 7, "id": "x", "instruction": "p", "output": "r", "prompt": "not this", "reference": "nor this"}
    columns = Columns(prompt="instruction", completion="output", id="uid")
    found = one(tmp_path, {**raw, "score": 1, "nothing": None}, *PAIR, columns=columns)
    assert found == {
        "id": "7", "prompt": [{"role": "user", "content": "p"}], "reference": "r", "score": 1, "nothing": None,
    }  # fmt: skip
    # What is not needed passes through as it is.
    assert one(tmp_path, {"prompt": "p", "reference": ["any"]}, "prompt")["reference"] == ["any"]


@pytest.mark.parametrize(
    ("raw", "columns", "hint"),
    [
        ({"instruction": "p", "completion": "c"}, Columns(), "did you mean --prompt-column 'instruction'?"),
        ({"promt": "p", "completion": "c"}, Columns(), "did you mean --prompt-column 'promt'?"),
        ({"prompt": "p", "output": "c"}, Columns(), "did you mean --completion-column 'output'?"),
        ({"conversations": [1]}, Columns(), "did you mean --messages-column 'conversations'?"),
        ({"prompt": "p", "completion": "c"}, Columns(prompt="promptt"), "did you mean --prompt-column 'prompt'?"),
        ({"prompt": "p", "completion": "c"}, Columns(id="row"), "name it with --id-column"),
        ({"a": "p"}, Columns(), "name it with --prompt-column"),
    ],
)
def test_a_missing_column_suggests_the_option(
    tmp_path: Path, raw: dict[str, Any], columns: Columns, hint: str
) -> None:
    for on_bad_row in ("stop", "reject"):
        with pytest.raises(UsageError, match="no row has this column; there are: ") as caught:
            one(tmp_path, raw, *PAIR, columns=columns, on_bad_row=on_bad_row)
        assert caught.value.hint == hint


# --- ids ---------------------------------------------------------------------------------------------


def test_ids_depend_on_the_prompt_and_not_on_the_order(tmp_path: Path) -> None:
    prompts = ["a", "b", "a", "c", "a"]
    rows = read_rows(write(tmp_path, "d.jsonl", lines(*({"prompt": p} for p in prompts))), ["prompt"])
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == 5
    assert ids[2] == f"{ids[0]}-2"
    assert ids[4] == rows[-1]["id"] == f"{ids[0]}-3"
    assert all(len(each) == 12 for each in (ids[0], ids[1], ids[3]))
    assert rows.notes == ["2 of 5 rows repeat the prompt of an earlier row"]
    turned = read_rows(write(tmp_path, "e.jsonl", lines(*({"prompt": p} for p in reversed(prompts)))), ["prompt"])
    assert {row["id"] for row in turned} == set(ids)
    assert {row["id"]: row["prompt"] for row in turned} == {row["id"]: row["prompt"] for row in rows}


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        ("1", "duplicate_id"),
        (1, "duplicate_id"),
        (1.0, "wrong_type"),
        (True, "wrong_type"),
        ("", "bad_id"),
        ("a\x1b[2J", "bad_id"),
        ("a\u202eb", "bad_id"),
        ("x" * 201, "bad_id"),
        (None, "mixed_schema"),
    ],
)
def test_bad_ids_name_their_row(tmp_path: Path, identity: object, reason: str) -> None:
    content = lines({"id": "1", "prompt": "a"}, {"id": identity, "prompt": "b"}, {"id": "3", "prompt": "a"})
    source = write(tmp_path, "d.jsonl", content)
    with pytest.raises(UsageError) as caught:
        read_rows(source, ["prompt"])
    assert str(caught.value).startswith(f"{source}:2 column 'id': ")
    assert str(caught.value).isprintable()
    rows = read_rows(source, ["prompt"], on_bad_row="reject", max_reject_share=0.5)
    assert [bad.reason for bad in rows.rejected] == [reason]
    assert [row["id"] for row in rows] == ["1", "3"]
    assert rows.where(1) == f"{source}:3"


# --- many bad rows -----------------------------------------------------------------------------------


def test_twenty_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    source = write(tmp_path, "d.jsonl", GOOD + row(prompt=1) * 35)
    with pytest.raises(UsageError) as caught:
        read_rows(source, PAIR)
    shown = str(caught.value).splitlines()
    assert len(shown) == 21
    assert shown[19].startswith(f"{source}:21 column 'prompt'")
    assert shown[20] == "and 15 more"


def test_rejecting_stops_above_the_share(tmp_path: Path) -> None:
    source = write(tmp_path, "d.jsonl", (GOOD * 49 + row(prompt="")) * 2)
    with pytest.raises(IncompleteError, match=r"2 of 100 rows are bad, at most 1\.00%") as caught:
        read_rows(source, PAIR, on_bad_row="reject")
    assert caught.value.exit_code == 3
    rows = read_rows(source, PAIR, on_bad_row="reject", max_reject_share=0.02)
    assert (len(rows), [bad.index for bad in rows.rejected]) == (98, [49, 99])
    with pytest.raises(IncompleteError):
        read_rows(write(tmp_path, "e.jsonl", row(prompt="")), PAIR, on_bad_row="reject", max_reject_share=1)


def test_max_rows_looks_no_further(tmp_path: Path) -> None:
    source = write(tmp_path, "d.jsonl", GOOD * 3 + b"junk\n")
    assert len(read_rows(source, PAIR, max_rows=3)) == 3
    with pytest.raises(UsageError, match="--max-rows"):
        read_rows(source, PAIR, max_rows=0)


# --- Rows as a sequence ------------------------------------------------------------------------------


def test_rows_are_a_sequence_that_no_caller_can_change(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "d.jsonl", lines(*({"prompt": f"p{i}"} for i in range(5)))), ["prompt"])
    assert isinstance(rows, Rows)
    assert list(rows) == list(rows) == [rows[i] for i in range(5)] == rows[:]
    assert rows[-1] == rows[4]
    assert rows[1:4:2] == [rows[1], rows[3]]
    with pytest.raises(IndexError):
        rows[5]
    rows[0]["prompt"][0]["content"] = "changed"
    assert rows[0]["prompt"][0]["content"] == "p0"


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.json"])
@pytest.mark.parametrize("change", ["append", "same size", "delete"])
def test_a_file_that_changes_under_the_rows_is_noticed(tmp_path: Path, name: str, change: str) -> None:
    content = {"d.jsonl": GOOD, "d.csv": b"prompt,completion\na,b\n", "d.json": b"[" + GOOD + b"]"}[name]
    path = Path(write(tmp_path, name, content))
    rows = read_rows(str(path), PAIR)
    if change == "delete":
        path.unlink()
    else:
        path.write_bytes(content + b" " if change == "append" else content.replace(b"a", b"A"))
        os.utime(path, ns=(1, 1))
    with pytest.raises(IntegrityError, match="changed while it was being used"):
        rows[0]


def test_memory_stays_flat(tmp_path: Path) -> None:
    source = write(tmp_path, "d.jsonl", b"".join(row(id=i, prompt=f"{i} " + "x" * 400) for i in range(8_000)))
    tracemalloc.start()
    try:
        rows = read_rows(source, PAIR)
        assert sum(1 for _ in rows) == 8_000
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The file has 3.6 MB; 32 bytes a row stay, and the sort of 8 000 numbers passes by.
    assert kept < 500_000
    assert peak < 2_000_000


def test_an_endless_line_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("wb") as file:
        file.write(GOOD)
        file.truncate(1 << 26)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r":2: the row has \d+ bytes"):
            read_rows(str(path), PAIR)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, sgpo_cli.rows, sgpo_cli.control_tokens; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "trl", "datasets", "pyarrow", "numpy", "yaml", "httpx2"} & set(modules)


# --- the Hub -----------------------------------------------------------------------------------------


def test_a_hub_table_is_read_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    asked = []

    def load(*name: str | None) -> tuple[pa.Table, list[str]]:
        asked.append(name)
        return pa.Table.from_pylist([{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": None}]), []

    monkeypatch.setattr(sources, "load_hub_table", load)
    assert read_rows("org/data:main", PAIR, max_rows=1, split="test")[0]["reference"] == "c"
    assert asked == [("org/data", "main", "test")]
    with pytest.raises(UsageError, match=r"^org/data:2 column 'completion': expected text, got null"):
        read_rows("org/data", PAIR)


def test_a_hub_data_set_becomes_a_table_and_its_errors_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        if split == "train":
            return datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}]).map(lambda row: row)
        raise ValueError(f'Unknown split "{split}".\nShould be one of [...]')

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "_hub_answers", lambda _: False)
    rows = read_rows("org/data", PAIR)
    assert (rows[0]["reference"], len(rows)) == ("c", 1)
    assert "read from the local cache" in rows.notes[0]
    with pytest.raises(UsageError, match=r'^org/data: the data set cannot be loaded: Unknown split "tset"\.$'):
        read_rows("org/data", PAIR, split="tset")
    assert not datasets.config.HF_HUB_OFFLINE


def test_an_unreachable_hub_is_said_within_seconds(tmp_path: Path) -> None:
    code = "from sgpo_cli.rows import read_rows; read_rows('no-such/data', ['prompt'])"
    # A port where nobody listens: as offline as a machine can be made without root.
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | nobody)
    assert time.monotonic() - start < 10
    assert "UsageError: no-such/data: no such file or directory, and no data set of this name" in done.stderr
    assert "the Hub is unreachable" in done.stderr


# --- control tokens ----------------------------------------------------------------------------------


def test_control_tokens_are_found_in_text_and_messages(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        "d.jsonl",
        lines(
            {"prompt": "p", "completion": "fine < im_end >"},
            {"prompt": "p <|im_end|>", "completion": "fine"},
            {"prompt": "p", "completion": "bad</s>"},
        ),
    )
    rows = read_rows(source, PAIR)
    found = control_tokens(rows, PAIR, ["</s>", "<|im_end|>", "<|im"])
    assert [(bad.index, bad.column, bad.reason, bad.where) for bad in found] == [
        (1, "prompt", "control_token", f"{source}:2"),
        (2, "reference", "control_token", f"{source}:3"),
    ]
    assert "'<|im_end|>'" in found[0].message
    assert control_tokens(rows, ["reference"], ["<|im_end|>"]) == []
    assert control_tokens(rows, PAIR, []) == []
    assert control_tokens([{"text": "a</s>"}], ["text"], ["</s>"])[0].where == "row 1"


def test_added_tokens_are_read_without_the_tokenizer(tmp_path: Path) -> None:
    assert added_tokens(tmp_path) == []
    tokens = [
        ("<|im_end|>", True),
        ("<think>", False),
        ("  ", False),
        ("\n\n", True),
        ("Zürich 2", False),
        ("PAD", True),
    ]
    listed = [{"id": i, "content": text, "special": special} for i, (text, special) in enumerate(tokens)]
    write(tmp_path, "tokenizer.json", json.dumps({"added_tokens": listed, "model": {"vocab": {}}}).encode())
    assert added_tokens(tmp_path) == ["<|im_end|>", "<think>", "PAD"]
    decoder = {"7": {"content": "<|extra|>", "special": True}, "8": {"content": "<think>", "special": False}}
    write(tmp_path, "tokenizer_config.json", json.dumps({"added_tokens_decoder": decoder}).encode())
    assert added_tokens(tmp_path) == ["<|im_end|>", "<think>", "PAD", "<|extra|>"]
    for broken in (b"{", b"[]", b'{"added_tokens": [1]}', b"\xff"):
        write(tmp_path, "tokenizer.json", broken)
        with pytest.raises(SgpoError, match=r"tokenizer\.json"):
            added_tokens(tmp_path)

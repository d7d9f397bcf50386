import gzip
import json

import pytest

from dllm_rl.tasks.rows import field, read_rows

ROWS = [{"a": "x"}, {"a": "line\u2028separator"}, {"a": "z"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", LINES),
        ("d.jsonl", LINES.rstrip()),
        ("d.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("d.json", json.dumps(ROWS).encode()),
        ("d.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS
    assert [row for _, row in read_rows(tmp_path / name, limit=2)] == ROWS[:2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "holds no rows"),
        ("d.json", b"[]", "holds no rows"),
        ("d.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        ("d.jsonl", b'{"a": 1}\n\n{"a": 2}\n', "line 2: is blank"),
        ("d.jsonl", b'{"a": 1}\n[1]\n', "line 2: is list"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8"),
        ("d.json", b'{"a": 1}', "expected a JSON array"),
        ("d.json", b"[\n1\n,", "line 3"),
        ("d.json", b"[1]", "row 1: is int"),
        ("d.jsonl.gz", b"plain", "not a complete gzip file"),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "not a complete gzip file"),
        ("d.csv", b"a\n1\n", "give .jsonl"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no data file 'd\.jsonl' \(looked from '.*'\)"):
        read_rows("d.jsonl")


@pytest.mark.parametrize("value", [None, 3, "", " ", ["x"]])
def test_a_column_must_be_text(value):
    with pytest.raises(ValueError, match="line 3: column 'a'"):
        field({"a": value}, "a", "line 3")
    with pytest.raises(ValueError, match="line 3: no column 'b'; the row has a"):
        field({"a": value}, "b", "line 3")

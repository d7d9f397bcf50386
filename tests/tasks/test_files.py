import gzip
import json

import pytest

from dllm_rl.tasks.files import field, read_rows

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
        ("d.txt", b"a\n1\n", "give .jsonl"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\\ud800"}\n', r"line 2: holds \\ud800, half of a surrogate pair"),
        ("d.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"\n", "line 2: is nested too deeply"),
        ("d.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2: not valid JSON: the key 'a' is given twice"),
        ("d.jsonl", b'{"a": 1}\n{"a": NaN}\n', "line 2: not valid JSON: NaN is no JSON number"),
        ("d.jsonl", b'{"a": 1}\n{"a": -Infinity}\n', "line 2: not valid JSON: -Infinity is no JSON number"),
        ("d.jsonl", b'{"a": 1}\n{"a": 1' + b"0" * 5000 + b"}\n", "line 2: not valid JSON"),
        ("d.csv", b"a,b\n1,2\n3\n", "line 3: has not as many fields"),
        ("d.csv", b"a,b\n1,2,3\n", "line 2: has not as many fields"),
        ("d.csv", b"a,a\n1,2\n", "line 1: column 'a' is named twice"),
        ("d.csv", b'a,b\n1,2\n3,"4\n', "line 3: not valid CSV"),
        ("d.csv", b"a\n\xff\n", "not UTF-8 at byte 2"),
        ("d.csv", b"a\n", "holds no rows"),
        ("d.parquet", b"no", "not a readable parquet file"),
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


def test_a_csv_holds_text_as_it_stands(tmp_path):
    (tmp_path / "d.csv").write_text('prompt,answer\n"two\nlines, quoted",007\nb,NA\n')
    assert read_rows(tmp_path / "d.csv") == [
        (f"{tmp_path}/d.csv, line 3", {"prompt": "two\nlines, quoted", "answer": "007"}),
        (f"{tmp_path}/d.csv, line 4", {"prompt": "b", "answer": "NA"}),
    ]


def test_a_glob_reads_its_files_in_the_order_of_their_names(tmp_path, monkeypatch):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"file": "{name}"}}\n' * 2)
    assert [row["file"] for _, row in read_rows(tmp_path / "*.jsonl", limit=3)] == ["a", "a", "b"]
    monkeypatch.setenv("DATA", str(tmp_path))
    assert len(read_rows("$DATA/b.jsonl")) == 2
    with pytest.raises(ValueError, match=r"no data file matches '.*\*\.csv'"):
        read_rows(tmp_path / "*.csv")


def test_what_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "x"}])
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "dev": table.select([1])}).save_to_disk(tmp_path / "several")
    for source in ("d.parquet", "one", "several"):
        assert [row for _, row in read_rows(tmp_path / source)] == list(table)
    assert [row["prompt"] for _, row in read_rows(tmp_path / "several", split="dev")] == ["b"]
    with pytest.raises(ValueError, match="has no split 'dve'; nearest is 'dev'"):
        read_rows(tmp_path / "several", split="dve")
    with pytest.raises(ValueError, match=r"is not a folder of datasets\.save_to_disk"):
        read_rows(tmp_path)

import json

import pytest

from effitrain.core.errors import InputError
from effitrain.data import hub
from effitrain.data.sources import open_source

ROWS = [{"prompt": "a, b", "completion": "c"}, {"prompt": 'line\nbreak "q"', "completion": "é\u2028x"}]


def write(path, rows):
    """``rows`` in the format of the suffix."""
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path):
    return [row.fields for row in open_source(str(path)).load()]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    assert load(write(tmp_path / f"set{suffix}", ROWS)) == ROWS


def test_an_object_with_data_and_json_lines_under_the_wrong_suffix(tmp_path):
    (tmp_path / "set.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert load(tmp_path / "set.json") == ROWS
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert load(tmp_path / "lines.json") == ROWS


def test_a_byte_order_mark_and_blank_lines_are_no_content(tmp_path):
    (tmp_path / "set.jsonl").write_bytes(b"\xef\xbb\xbf" + b'\r\n\n{"text": "a"}\r\n\r\n')
    assert load(tmp_path / "set.jsonl") == [{"text": "a"}]
    (tmp_path / "set.txt").write_bytes(b"\xef\xbb\xbfHello")
    assert load(tmp_path / "set.txt") == [{"text": "Hello"}]


def test_a_very_long_csv_cell(tmp_path):
    rows = [{"text": "x" * 300_000}]
    assert load(write(tmp_path / "set.csv", rows)) == rows


def test_a_folder_gives_the_rows_of_its_files_in_order_of_name(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[1:])
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "z.csv", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "c.jsonl", ROWS)
    assert load(tmp_path) == ROWS


def test_text_files_are_running_text(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "c.txt").write_text(" \n")
    assert open_source(str(tmp_path)).running_text
    assert load(tmp_path) == [{"text": "one"}, {"text": "two"}]
    assert not open_source(str(write(tmp_path / "set.jsonl", ROWS))).running_text


def test_the_digest_follows_the_content(tmp_path):
    first = open_source(str(write(tmp_path / "a.jsonl", ROWS))).digest
    assert open_source(str(write(tmp_path / "b.jsonl", ROWS))).digest == first
    assert open_source(str(write(tmp_path / "b.jsonl", ROWS[:1]))).digest != first


def test_a_row_says_where_it_stands(tmp_path):
    (tmp_path / "set.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.where for row in open_source(str(tmp_path / "set.jsonl")).load()] == [
        "set.jsonl row 1",
        "set.jsonl row 3",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b\n', "a.jsonl: broken JSON at line 3"),
        ("a.json", b'[\n{"text": "a"},\n{"text" "b"}]', "a.json: broken JSON at line 3"),
        ("a.json", b'{"text": "a"}\n{"text" "b"}', "a.json: broken JSON at line 2"),
        ("a.json", b"", "a.json: broken JSON at line 1"),
        ("a.json", b'{"text": "a"}', "a.json holds no list of rows but a dict"),
        ("a.json", b'"text"', "a.json holds no list of rows but a str"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', "a.jsonl row 2 is not an object with columns but a list"),
        ("a.json", b'[{"text": "a"}, null]', "a.json row 2 is not an object with columns but a NoneType"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv row 2 has more cells than the header has columns"),
        ("a.csv", b'a,b\n1,2\n"1"x,2\n', "a.csv: broken CSV at line 3"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not a readable parquet file"),
        ("a.txt", b"fine\nb\xe9bt", "a.txt is not UTF-8 text: byte 6 is 0xe9"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        open_source(str(tmp_path / name)).load()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        ((), "missing.jsonl", "There is no file or folder"),
        ((), "./missing", "There is no file or folder"),
        ((), "missing", "There is no file or folder"),
        ((), "a/b/c", "There is no file or folder"),
        ((), "", "There is no file or folder"),
        (("set.bin",), "set.bin", "set.bin is not a data file that can be read"),
        (("folder/x.md",), "folder", "holds no data file"),
        (("folder/x.txt", "folder/y.jsonl"), "folder", "mixes running text (.txt) and rows"),
    ],
)
def test_what_is_no_data_set(tmp_path, monkeypatch, make, name, message):
    monkeypatch.chdir(tmp_path)
    for path in make:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("x")
    with pytest.raises(InputError) as error:
        open_source(name)
    assert message in str(error.value)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "set.jsonl", ROWS)

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(InputError, match=r"set\.jsonl cannot be read: Permission denied"):
        open_source(str(path))


def test_the_built_in_set():
    rows = open_source(None).load()
    assert len(rows) > 100
    assert all(row.fields["instruction"] and row.fields["output"] for row in rows)


def test_rows_of_the_hub(monkeypatch):
    monkeypatch.setattr(hub, "hub_rows", lambda name: ROWS)
    monkeypatch.setattr("effitrain.data.sources.hub_rows", lambda name: ROWS)
    source = open_source("owner/name")
    assert [row.fields for row in source.load()] == ROWS
    assert source.load()[1].where == "owner/name row 2"
    assert not source.running_text

"""What each kind of source yields, in which order, and what a user's mistakes say."""

import gzip
import json
import os
import pickle
import random
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from algpt2.corpus import docstrings, listing, readers, words
from algpt2.corpus.documents import documents, first_bytes, read_batches
from algpt2.corpus.listing import identify_parts, identify_sources, list_parts
from algpt2.corpus.parts import BrokenInput, CorpusCounts, Reading
from algpt2.corpus.words import count_words
from algpt2.errors import UserError


def read(*sources, n_files=None, counts=None, **reading):
    """The documents of some sources."""
    paths = [str(source) for source in sources]
    return list(documents(paths, Reading(**reading), n_files=n_files, counts=counts))


def read_parts(parts, *, counts=None, **reading):
    """The documents of some parts, as UTF-8."""
    counts = CorpusCounts() if counts is None else counts
    for (text,) in read_batches(parts, Reading(**reading), counts, batch_bytes=1):
        yield text


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(path, texts, name="text", type_=None, row_group_size=2, **options):
    table = pa.table({"source": [0] * len(texts), name: pa.array(texts, type_)})
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return path


def zstd(content):
    return pa.compress(content, codec="zstd", asbytes=True)


# --- files and folders ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "text"
    for name in ("b.txt", "a/z.txt", "a/a.md", "a.txt", "B", "c/deep/er.text", ".hidden", ".git/x"):
        write(root / name, name)
    write(root / "picture.png", b"\x89PNG")
    write(root / "config.json", "{}")
    write(root / "d.jsonl", lines({"text": "row 1"}, {"text": "row 2"}))
    write_parquet(root / "e.parquet", ["row 3"])
    return root


def test_a_folder_is_read_recursively_in_the_order_of_its_sorted_paths(folder):
    counts = CorpusCounts()
    texts = read(folder, counts=counts)
    paths = sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.suffix in ("", ".txt", ".md", ".text") and ".git" not in p.parts
    )
    names = [path for path in paths if not path.startswith(".")]
    assert texts == [*names, "row 1", "row 2", "row 3"]
    assert names == ["B", "a.txt", "a/a.md", "a/z.txt", "b.txt", "c/deep/er.text"]
    assert counts.other_files == {".png": 1, ".json": 1}


def test_the_order_does_not_depend_on_the_file_system(folder, monkeypatch):
    texts = read(folder)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return reversed(list(self.entries))

        def __exit__(self, *error):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    assert read(folder) == texts


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "elsewhere" / "far.txt", "far")
    write(tmp_path / "text" / "near.txt", "near")
    (tmp_path / "text" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "text")
    assert read(tmp_path / "text") == ["far", "near"]


def test_the_order_of_the_sources_is_kept_and_n_files_counts_over_them(folder):
    assert read(folder / "b.txt", folder / "a") == ["b.txt", "a/a.md", "a/z.txt"]
    assert read(folder / "b.txt", folder / "a", n_files=2) == ["b.txt", "a/a.md"]
    counts = CorpusCounts()
    assert read(folder / "d.jsonl", folder / "a", n_files=1, counts=counts) == ["row 1", "row 2"]
    assert counts.files == 1


def test_globs_are_sorted_recursive_and_take_what_they_name(folder):
    write(folder / "code.py", "code")
    assert read(f"{folder}/*.txt") == ["a.txt", "b.txt"]
    assert read(f"{folder}/*.py") == ["code"]  # a folder would not take it
    assert read(f"{folder}/[ab]") == ["a/a.md", "a/z.txt"]
    assert read(f"{folder}/**/*.txt") == ["a.txt", "a/z.txt", "b.txt"]
    counts = CorpusCounts()
    texts = read(f"{folder}/a/**", counts=counts)
    assert texts == ["a/a.md", "a/z.txt"]
    assert read(f"{folder}/*.p*", counts=counts) == ["code", "row 3"]
    assert counts.other_files == {".png": 1}


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path):
    assert read(write(tmp_path / "a[1].txt", "brackets")) == ["brackets"]


def test_lines_become_documents_without_their_ends(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\n\n two\n   \nthree")
    counts = CorpusCounts()
    assert read(path, line_by_line=True, counts=counts) == ["one", " two", "three"]
    assert (counts.documents, counts.empty, counts.line_ends) == (3, 2, 0)
    rows = write(tmp_path / "b.jsonl", lines({"text": "x\ny"}, {"text": "z\n"}))
    assert read(rows, line_by_line=True) == ["x", "y", "z"]


def test_bytes_words_and_line_ends_of_the_documents_are_counted(tmp_path):
    write(tmp_path / "a.txt", "Grüße  an\nalle\n")
    write(tmp_path / "b.txt", "x")
    counts = CorpusCounts()
    texts = read(tmp_path, counts=counts)
    assert counts.text_bytes == sum(len(text.encode()) for text in texts) == 18
    assert (counts.files, counts.documents, counts.words, counts.line_ends) == (2, 2, 4, 2)
    assert str(counts) == "2 files, 2 documents, 0.0 MB of text, 4 words"


def test_undecodable_bytes_are_replaced_and_counted_and_empty_files_counted(tmp_path):
    write(tmp_path / "a.txt", b"caf\xe9 \xff!")
    write(tmp_path / "b.txt", b"")
    write(tmp_path / "c.txt", b" \n\t")
    write(tmp_path / "d.txt", b"\xef\xbb\xbfa byte order mark")
    counts = CorpusCounts()
    assert read(tmp_path, counts=counts) == ["caf\ufffd \ufffd!", "a byte order mark"]
    assert (counts.undecodable, counts.empty, counts.documents) == (1, 2, 2)
    assert "2 empty" in str(counts) and "1 with undecodable bytes" in str(counts)


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_jsonl_and_text_are_read_through_compression(tmp_path, suffix, pack):
    rows = lines({"text": "eins", "n": 1}, {"text": ""}, {"text": None}, {"text": "zwei"}) + "\n"
    counts = CorpusCounts()
    path = write(tmp_path / f"a.jsonl{suffix}", pack(rows.encode()))
    assert read(path, counts=counts) == ["eins", "zwei"]
    assert counts.empty == 3
    assert read(write(tmp_path / f"a.txt{suffix}", pack(b"text"))) == ["text"]
    assert len(read(tmp_path)) == 3


def test_jsonl_with_lone_surrogates_or_bad_bytes_gives_valid_unicode(tmp_path):
    raw = b'{"text": "a \\ud800 b"}\n{"text": "\\ud83d\\ude00"}\n{"text": "\xff"}\n'
    counts = CorpusCounts()
    texts = read(write(tmp_path / "a.jsonl", raw), counts=counts)
    assert texts == ["a \ufffd b", "\N{GRINNING FACE}", "\ufffd"]
    assert counts.undecodable == 2


@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_row_groups_are_read_in_order(tmp_path, type_):
    texts = ["a", "b", None, "c", "d"]
    path = write_parquet(tmp_path / "a.parquet", texts, type_=type_)
    assert pq.ParquetFile(path).num_row_groups == 3
    counts = CorpusCounts()
    assert read(path, counts=counts) == ["a", "b", "c", "d"]
    assert counts.empty == 1


def test_another_text_key(tmp_path):
    assert read(write(tmp_path / "a.jsonl", lines({"body": "b"})), text_key="body") == ["b"]
    assert read(write_parquet(tmp_path / "a.parquet", ["p"], "body"), text_key="body") == ["p"]


def test_hub_datasets_from_a_local_folder(tmp_path, monkeypatch):
    write(tmp_path / "set" / "train.jsonl", lines(*({"text": f"row {i}"} for i in range(5))))
    write(tmp_path / "set" / "validation.jsonl", lines({"text": "held out"}))
    monkeypatch.chdir(tmp_path)
    assert read("hf:set", n_files=3) == ["row 0", "row 1", "row 2"]
    assert read("hf:set:validation") == read(f"hf:{tmp_path}/set:validation") == ["held out"]
    with pytest.raises(UserError, match=r"hf:set:test: .*Bad split"):
        read("hf:set:test")
    with pytest.raises(UserError, match=r"'body' .* among text"):
        read("hf:set", text_key="body")


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("gs://bucket/text", "gs://bucket/text: text is not read from URLs"),
        ("no*thing", "no\\*thing holds no text: .* found no file"),
        ("empty", "empty holds no text: .* found no file"),
        ("pictures", r"pictures holds no text: .* found 3 other files \(.png: 2, .rar: 1\)"),
        ("pictures/a.png", "a.png is not a text file"),
        ("docs:test", "expected docs:train, docs:valid or docs:all"),
        ("hf:", "needs the name of a dataset"),
    ],
)
def test_sources_without_text_are_named_before_anything_is_read(
    tmp_path, monkeypatch, source, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("a.png", "b.png", "c.rar"):
        write(Path("pictures") / name, "x")
    write(Path("good.txt"), "good")
    with pytest.raises(UserError, match=message):
        documents(["good.txt", source])  # already this call, without iterating


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "good"}\n{"text": "cut', "a.jsonl, line 2: expected a JSON object"),
        ("a.jsonl", '"text"\n', "line 1: expected a JSON object, got a str"),
        ("a.jsonl", '{"content": "x", "id": 1}\n', "line 1: no 'text' .* among content, id"),
        ("a.jsonl", '{"text": ["x"]}\n', "line 1: expected text in 'text', got a list"),
        ("a.jsonl", "[" * 100_000, "line 1: expected a JSON object"),
        (
            "a.jsonl.gz",
            gzip.compress(os.urandom(5000).hex().encode())[:-999],
            "a.jsonl.gz: cannot be decompr",
        ),
        ("a.txt.gz", b"not gzip", "a.txt.gz: cannot be decompressed"),
        (
            "a.txt.zst",
            zstd(os.urandom(5000).hex().encode())[:-999],
            "a.txt.zst: cannot be decompressed",
        ),
        ("a.parquet", b"not parquet", "a.parquet: not a parquet file"),
        ("a.txt", "", "no document in .*a.txt: .* 1 empty"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / name, content))


def test_parquet_without_the_column_or_with_one_of_numbers(tmp_path):
    with pytest.raises(UserError, match=r"a.parquet: no 'text' .* among source, body"):
        read(write_parquet(tmp_path / "a.parquet", ["x"], "body"))
    with pytest.raises(UserError, match=r"b.parquet: column 'text' holds int64"):
        read(write_parquet(tmp_path / "b.parquet", [1, 2]))


def test_a_damaged_page_of_a_parquet_file_is_an_error(tmp_path):
    texts = ["damaged here", "not here"]
    path = tmp_path / "a.parquet"
    write_parquet(path, texts, write_page_checksum=True, compression="none")
    assert read(path) == texts
    path.write_bytes(path.read_bytes().replace(b"damaged", b"DAMAGED", 1))
    with pytest.raises(UserError, match=r"a.parquet: not a parquet file that can be read .*CRC"):
        read(path)


def test_broken_files_and_lines_are_left_out_on_request(tmp_path, capsys):
    rows = lines({"text": "1"}) + "{broken\n" + lines({"text": "2"}) + "[1]\n"
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.txt.gz", gzip.compress(os.urandom(5000))[:-99])
    write(tmp_path / "c.parquet", "not parquet")
    write(tmp_path / "d.txt", "whole")
    counts = CorpusCounts()
    assert read(tmp_path, skip_broken=True, counts=counts) == ["1", "2", "whole"]
    assert counts.n_broken == 4 and "a.jsonl, line 2: expected a JSON object" in counts.broken[0]
    assert [message.partition(":")[0].split("/")[-1] for message in counts.broken] == [
        "a.jsonl, line 2", "a.jsonl, line 4", "b.txt.gz", "c.parquet"
    ]  # fmt: skip
    assert capsys.readouterr().out.count("left out: ") == 4
    assert "4 broken inputs left out" in str(counts)
    write(tmp_path / "a.jsonl", lines({"body": "x"}))
    with pytest.raises(UserError, match=r"no document in .*no 'text' .--text_key names"):
        read(tmp_path / "a.jsonl", skip_broken=True)


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.txt.gz"])
def test_a_file_that_cannot_be_read_is_left_out_alone(tmp_path, name):
    for each in ("a.txt", name, "c.txt"):
        write(tmp_path / each, each)
    parts = list(list_parts([str(tmp_path)]))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()  # reading it fails, for root as well
    with pytest.raises(BrokenInput, match=rf"/{name}: cannot be read \(Is a directory\); --skip"):
        list(read_parts(parts, counts=CorpusCounts()))
    counts = CorpusCounts()
    assert [*read_parts(parts, skip_broken=True, counts=counts)] == [b"a.txt", b"c.txt"]
    assert counts.n_broken == 1


def test_pipes_and_links_to_nowhere_are_counted_and_never_opened(tmp_path):
    write(tmp_path / "a.txt", "text")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, target in (("gone.txt", "nowhere"), ("one.txt", "two.txt"), ("two.txt", "one.txt")):
        (tmp_path / name).symlink_to(target)
    for source in (tmp_path, tmp_path / "*"):
        counts = CorpusCounts()
        assert read(source, counts=counts) == ["text"]
        assert counts.other_files == {".txt": 4}
    with pytest.raises(UserError, match=r"pipe.txt is a pipe or a device: expected a file"):
        read(tmp_path / "pipe.txt")


def test_a_folder_that_cannot_be_listed_is_broken(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "closed" / "b.txt", "never read")
    scandir = os.scandir

    def closed(path):
        if "closed" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(BrokenInput, match=r"closed/: cannot be read \(Permission denied\)"):
        read(tmp_path)
    counts = CorpusCounts()
    assert read(tmp_path, skip_broken=True, counts=counts) == ["text"]
    assert counts.n_broken == 1


def test_a_long_line_of_json_gives_what_a_short_one_gives(tmp_path, monkeypatch):
    rows = [{"tëxt": t} for t in ("€🙂 \n text", "", None, "\\ and \\u00e9", 'a "quote"')]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    escaped = ('é🙂 \x0b " \\', "lone \udc00 \ud83d", "\\\\u00e9 \\ \u0080\u00ff")
    content += lines(*({"tëxt": text} for text in escaped))  # keys too
    content = content.encode() + b'{"t\xc3\xabxt": "bad \xff"}\n'
    path = write(tmp_path / "a.jsonl", content)
    short = read(path, text_key="tëxt")
    monkeypatch.setattr(readers, "LONG_BYTES", 1)
    assert read(path, text_key="tëxt") == short
    assert [short[0], short[2], short[-1]] == ["€🙂 \n text", 'a "quote"', "bad \ufffd"]
    write(path, '{"b": "x"}\n')
    with pytest.raises(UserError, match=r"no .t.{1,2}xt."):
        read(path, text_key="tëxt")


@pytest.mark.parametrize("words_bytes", [1, 2, 7])
def test_a_long_text_is_looked_at_in_pieces(tmp_path, monkeypatch, words_bytes):
    monkeypatch.setattr(words, "BLOCK_BYTES", words_bytes)
    contents = {"a": "€🙂 text", "b": " \u3000\n" * 9, "c": b"\xe2\x82 cut \xf0\x9f", "d": "ab"}
    for name, content in contents.items():
        write(tmp_path / f"{name}.txt", content)
    counts = CorpusCounts()
    found = read(tmp_path, min_length=3, counts=counts)
    assert found == ["€🙂 text", "\ufffd\ufffd cut \ufffd\ufffd"]
    assert (counts.empty, counts.undecodable, counts.short, counts.words) == (1, 1, 1, 5)


@pytest.mark.parametrize("change", ["longer", "other", "gone"])
@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.txt.gz", "b.parquet"])
def test_a_file_that_changes_under_it_is_named(tmp_path, name, change):
    contents = {"b.txt": "text", "b.jsonl": lines({"text": "x"}), "b.txt.gz": gzip.compress(b"x")}
    path = tmp_path / name
    write_parquet(path, ["x"]) if name == "b.parquet" else write(path, contents[name])
    for other in ("a.txt", "c.txt"):
        write(tmp_path / other, other)
    texts = documents(str(tmp_path))
    parts = list(list_parts([str(tmp_path)]))
    assert next(texts) == "a.txt"
    if change == "longer":
        path.write_bytes(path.read_bytes() * 2)
    elif change == "other":
        os.utime(path, ns=(0, 1))
    else:
        path.unlink()
    what = "it is gone" if change == "gone" else "it has [0-9,]+ bytes now"
    with pytest.raises(UserError, match=rf"{name} has changed since .* \({what}\)"):
        list(read_parts(parts, counts=CorpusCounts()))
    if name == "b.txt":  # listed with a.txt
        with pytest.raises(UserError, match=rf"{name} has changed"):
            list(texts)


def test_a_file_that_grows_while_it_is_read_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(*({"text": f"row {i}"} for i in range(9))))
    texts = documents(str(path))
    assert next(texts) == "row 0"
    with path.open("a") as file:
        file.write(lines({"text": "late"}))
    with pytest.raises(UserError, match=r"a.jsonl has changed"):
        list(texts)


def test_short_documents_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.txt", "ä\nää\näää\n\nab\n")
    counts = CorpusCounts()
    assert read(path, line_by_line=True, min_length=2, counts=counts) == ["ää", "äää", "ab"]
    assert (counts.documents, counts.short, counts.empty) == (3, 1, 1)
    assert "1 short documents left out" in str(counts)


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words_bytes", [1 << 20, 300, 7])
def test_words_are_what_split_finds(monkeypatch, words_bytes):
    monkeypatch.setattr(words, "BLOCK_BYTES", words_bytes)
    spaces = [chr(i) for i in range(0x110000) if chr(i).isspace()]
    near = [chr(ord(s) + i) for s in spaces for i in (-1, 1) if ord(s)]
    alphabet = [*spaces * 3, *near, *"abcdefgh" * 5, "é", "漢", "😀", "\u00a1", "\u2010", "\u3001"]
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=draw.choice([0, 1, 2, 300, 2000])))
        assert count_words(text.encode()) == len(text.split()), text
    for text in [*spaces, *near, " " * 999, "a" * 999, " a" * 999, "a " * 999]:
        assert count_words(text.encode()) == len(text.split())
        assert count_words((text + "b" * 400 + text).encode()) == len(
            f"{text}{'b' * 400}{text}".split()
        )


def test_words_of_many_documents_are_counted_once_each(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "BLOCK_BYTES", 50)
    texts = [f"{i} words\u2003here\u00a0" * (i % 9) + "end" for i in range(200)]
    path = write(tmp_path / "a.jsonl", lines(*({"text": text} for text in texts)))
    counts = CorpusCounts()
    for n, _ in enumerate(documents(str(path), counts=counts), start=1):
        if n % 7 == 0:
            assert counts.words == sum(len(text.split()) for text in texts[:n])
    total = CorpusCounts()
    total.add(asdict(counts))
    assert total.words == counts.words == sum(len(text.split()) for text in texts)
    assert total == counts


# --- parts, description, cap ---------------------------------------------------------------------


def test_parts_name_what_can_be_read_on_its_own(folder):
    sources = [str(folder / "a"), str(folder / "d.jsonl"), "docs:", "hf:x:y"]
    parts = list(list_parts(sources))
    assert [(part.kind, part.name, part.files, part.n_files) for part in parts] == [
        ("text", f"{folder}/a/", "a.md\0z.txt", 2),
        ("jsonl", f"{folder}/d.jsonl", "", 1),
        ("docs", "train", "", None),
        ("hf", "x:y", "", None),
    ]
    assert parts[0].paths == [f"{folder}/a/a.md", f"{folder}/a/z.txt"] and parts[0].size == 13
    assert [part.source for part in parts] == sources
    assert pickle.loads(pickle.dumps(parts)) == parts


def read_by_parts(source, **options):
    """The documents of each part, read in an order and in readers of their own."""
    parts = list(list_parts([str(source)], Reading(**options)))
    counts = CorpusCounts()
    texts = {
        i: [raw.decode() for raw in read_parts([parts[i]], counts=counts, **options)]
        for i in range(len(parts))[::-1]
    }
    return [texts[i] for i in range(len(parts))], counts


def test_a_run_of_files_ends_by_number_and_by_bytes(tmp_path, monkeypatch):
    for i in range(25):
        write(tmp_path / f"{i:02}.txt", "x" * (i + 1))
    monkeypatch.setattr(listing, "RUN_FILES", 10)
    texts, counts = read_by_parts(tmp_path)
    assert [len(part) for part in texts] == [10, 10, 5] and counts.files == 25
    monkeypatch.setattr(listing, "RUN_BYTES", 30)
    texts, _ = read_by_parts(tmp_path)
    assert [len(part) for part in texts][:4] == [7, 3, 2, 2]
    assert [text for part in texts for text in part] == read(tmp_path)
    write(tmp_path / "01.jsonl", lines({"text": "a table between them"}))
    texts, _ = read_by_parts(tmp_path)
    assert texts[0] == ["x"] and texts[1] == ["a table between them"]


@pytest.mark.parametrize("piece_bytes", [1, 40, 64, 100, 50_000])
def test_large_tables_and_texts_of_lines_are_read_in_pieces(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(listing, "PIECE_BYTES", piece_bytes)
    texts = [f"row {i} " + "ü" * (i * 7 % 50) for i in range(40)]
    sources = {
        write(tmp_path / "a.jsonl", "\ufeff" + lines(*({"text": text} for text in texts))): {},
        write(tmp_path / "a.txt", "\ufeff" + "\n".join(texts)): {"line_by_line": True},
        write_parquet(tmp_path / "a.parquet", texts): {},
    }
    for path, options in sources.items():
        found, counts = read_by_parts(path, **options)
        assert [text for part in found for text in part] == texts == read(path, **options)
        assert (len(found) > 1) == (piece_bytes <= path.stat().st_size)
        assert counts.files == 1
        assert read(path, write(tmp_path / "b", "b"), n_files=1, **options) == texts


def test_a_broken_line_in_a_piece_is_found_by_its_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "PIECE_BYTES", 30)
    rows = lines(*({"text": f"row {i}"} for i in range(5)))
    path = write(tmp_path / "a.jsonl", rows + "{broken\n" + rows)
    with pytest.raises(UserError, match=rf"a.jsonl, byte {len(rows)}: expected a JSON object"):
        read(path)


def test_the_description_of_parts_is_that_of_their_sources(folder, monkeypatch):
    monkeypatch.setattr(listing, "RUN_FILES", 2)
    sources = [str(folder), "docs:valid"]
    monkeypatch.setattr(listing, "package_versions", lambda: {"package": "1"})
    for n_files in (None, 1, 3, 100):
        parts = list(list_parts(sources))
        assert identify_parts(parts, n_files) == identify_sources(sources, n_files=n_files)
    assert identify_sources(sources, n_files=3)[0]["files"] == 3
    assert identify_sources(sources, n_files=3)[0]["bytes"] == 12


def test_the_description_changes_with_the_files_and_only_with_them(folder):
    first = identify_sources(str(folder / "a"))
    assert first == identify_sources([str(folder / "a")])
    assert first[0]["files"] == 2 and first[0]["bytes"] == 13
    json.dumps(first)
    os.utime(folder / "a" / "z.txt", ns=(0, 0))
    assert identify_sources(str(folder / "a")) != first
    assert len(identify_sources([str(folder / "a"), "docs:"], n_files=2)) == 1
    assert identify_sources("docs:")[0]["packages"].keys() <= set(docstrings.PACKAGES)


def test_first_bytes_cuts_at_a_character():
    assert list(first_bytes(["abc", "défg", "h"], 5)) == ["abc", "d"]
    assert list(first_bytes(["abc", "d"], 3)) == ["abc"]
    assert list(first_bytes(["abc", "d"], 100)) == ["abc", "d"]


# --- docs: ---------------------------------------------------------------------------------------


LONG = "Explain at length. " * 12


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package whose sources are text only: importing it would fail."""
    root = tmp_path / "site" / "fakepackage"
    method = 'class A:\n    """short"""\n    def f(self):\n'
    method += f'        """{LONG}\n\n        indented\n        """\n'
    write(root / "__init__.py", f'"""Module. {LONG}"""\nraise ImportError("never imported")\n')
    write(root / "b.py", method + f"if True:\n    def g():\n        '''Two. {LONG}'''\n")
    write(root / "copy.py", method)
    write(root / "template.py", f'"""{LONG}"""\n{{% if not python %}}\n')
    write(root / "escapes.py", f'"""Escape \\d. {LONG}"""\n')
    monkeypatch.syspath_prepend(root.parent)
    monkeypatch.setattr(docstrings, "PACKAGES", ("fakepackage", "missingpackage"))
    monkeypatch.setattr(
        docstrings.importlib.metadata, "version", lambda name: {"fakepackage": "1.0"}[name]
    )
    return root


def test_docs_are_the_long_docstrings_each_once_and_cleaned(package, capsys):
    texts = read("docs:all")
    assert texts == [
        f"Module. {LONG}", f"{LONG}\n\nindented", f"Two. {LONG}", f"Escape \\d. {LONG}"
    ]  # fmt: skip
    assert "fakepackage" not in sys.modules
    assert "without missingpackage (not installed)" in capsys.readouterr().out


def test_docs_are_split_by_their_hash_without_overlap(package):
    write(package / "many.py", "".join(f'def f{i}():\n    """{i} {LONG}"""\n' for i in range(1000)))
    train, valid = read("docs:train"), read("docs:valid")
    assert sorted(train + valid) == sorted(read("docs:all")) and not set(train) & set(valid)
    assert 8 <= len(valid) <= 35
    assert read("docs:") == train
    assert read("docs:", n_files=7) == train[:7]


def test_docs_are_kept_and_made_anew_when_damaged_or_of_another_version(
    package, capsys, monkeypatch
):
    texts = read("docs:all")
    assert "reading the docstrings" in capsys.readouterr().out
    (cached,) = Path(os.environ["ALGPT2_CACHE"]).iterdir()
    package.joinpath("b.py").unlink()  # not noticed: the version stands for the sources
    assert read("docs:all") == texts
    assert capsys.readouterr().out == ""
    cached.write_bytes(cached.read_bytes()[:-1])
    assert len(read("docs:all")) == len(texts) - 1
    assert f"{cached} is damaged" in capsys.readouterr().out
    monkeypatch.setattr(docstrings.importlib.metadata, "version", lambda name: "2.0")
    read("docs:all")
    assert len(list(Path(os.environ["ALGPT2_CACHE"]).iterdir())) == 2


def test_docs_work_without_a_cache_and_say_so(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALGPT2_CACHE", str(write(tmp_path / "file", "") / "cache"))
    assert read("docs:all")
    assert "not kept (Not a directory" in capsys.readouterr().out


def test_a_full_disk_leaves_no_half_cache(package, monkeypatch, capsys):
    def full_disk(path, raw):
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    assert read("docs:all")
    assert "not kept (No space left on device" in capsys.readouterr().out
    assert list(Path(os.environ["ALGPT2_CACHE"]).iterdir()) == []


def test_docs_need_a_package(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("missingpackage",))
    with pytest.raises(UserError, match="docs: needs one of the packages missingpackage"):
        read("docs:")


def test_docs_of_a_real_package(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("tqdm",))
    texts = read("docs:all")
    assert len(texts) > 10 and all(len(text) >= 200 for text in texts)
    assert any("Decorate an iterable object" in text for text in texts)


def test_words_of_a_long_text_are_a_number_that_json_knows():
    text = "two words " * (words.BLOCK_BYTES // 4)
    n_words = count_words(text.encode())
    assert json.loads(json.dumps(n_words)) == len(text.split())


def test_a_text_is_blank_as_a_string_would_be():
    spaces = [c for c in map(chr, range(0x110000)) if c.isspace()]
    for text in [*spaces, "".join(spaces), *(s + "x" for s in spaces), "é", "\u200b", " \ufeff"]:
        assert words.is_blank(text.encode()) == text.isspace(), repr(text)


# --- content that contradicts its name ------------------------------------------------------------


TEXT = "one line of text\n" * 40


@pytest.mark.parametrize("line_by_line", [False, True])
@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress)])
@pytest.mark.parametrize(
    "content, found",
    [
        (TEXT.encode("utf-16-le"), "UTF-16 without a mark"),
        (TEXT.encode("utf-16"), "UTF-16"),
        (TEXT.encode("utf-16-be"), "UTF-16 without a mark"),
        (TEXT.encode("utf-32"), "UTF-32"),
        (gzip.compress(b"a"), "gzip"),
        (zstd(b"a"), "zstd"),
        (b"\x89ELF\0\0", "binary"),
    ],
)
@pytest.mark.parametrize("name", ["b.txt", "b", "b.jsonl"])
def test_content_that_is_no_utf8_is_named(
    tmp_path, name, content, found, suffix, pack, line_by_line
):
    write(tmp_path / "a.txt", TEXT)
    write(tmp_path / (name + suffix), pack(content))
    with pytest.raises(BrokenInput, match=f"{name}{suffix}.*expected UTF-8 text, found.*{found}"):
        read(tmp_path, line_by_line=line_by_line)
    counts = CorpusCounts()
    texts = read(tmp_path, counts=counts, skip_broken=True, line_by_line=line_by_line)
    assert (len(texts), counts.n_broken) == (40 if line_by_line else 1, 1)


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress)])
@pytest.mark.parametrize("name", ["wiki_00", "wiki.txt", "wiki.dump"])
@pytest.mark.parametrize("first", ["a", "long " * 4000])
def test_json_lines_are_rows_whatever_their_name(tmp_path, monkeypatch, name, first, suffix, pack):
    rows = pack(lines({"id": 1, "text": first}, {"id": 2, "text": "b"}).encode())
    path = write(tmp_path / (name + suffix), rows)
    assert read(path) == read(path, line_by_line=True) == [first, "b"]
    monkeypatch.setattr(listing, "PIECE_BYTES", 10)
    assert read(path, line_by_line=True) == [first, "b"]
    with pytest.raises(UserError, match=r"no 'body' .*among id, text"):
        read(path, text_key="body")


@pytest.mark.parametrize("text", ['{"a": 1}', '{"text": ', "{\\bf x}\n{}\n", '{\n"text": "a"}'])
def test_a_text_in_braces_is_a_text(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text)) == [text]


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".gz", gzip.compress)])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_line_ends_of_every_system_are_the_same(tmp_path, monkeypatch, end, suffix, pack):
    text = "\nfirst line\n\nsecond line\n"
    path = write(tmp_path / f"a.txt{suffix}", pack(text.replace("\n", end).encode()))
    assert read(path) == [text]
    assert read(path, line_by_line=True) == ["first line", "second line"]
    rows = lines({"text": "a\r\nb"}, {"text": "c"}).replace("\n", end)
    table = write(tmp_path / f"a.jsonl{suffix}", pack(rows.encode()))
    assert read(table) == ["a\r\nb", "c"]  # what a row holds is data
    monkeypatch.setattr(listing, "PIECE_BYTES", 10)
    assert read(path, line_by_line=True) == ["first line", "second line"]
    assert read(table) == ["a\r\nb", "c"]


def test_a_suffix_has_a_letter_and_no_blank(tmp_path):
    names = ("Paris", "St. Louis", "U.S. history", "1.", "a.png")
    for name in names:
        write(tmp_path / name, name)
    counts = CorpusCounts()
    assert sorted(read(tmp_path, counts=counts)) == sorted(names[:-1])
    assert counts.other_files == {".png": 1}


def test_a_row_without_text_costs_only_itself(tmp_path, monkeypatch):
    rows = [{"text": "a"}, {"id": 1}, {"text": 7}, {"text": None}, {"text": "b"}]
    path = write(tmp_path / "a.jsonl", lines(*rows))
    write_parquet(tmp_path / "b.parquet", ["x"], name="body")
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), tmp_path / "c.parquet")
    write_parquet(tmp_path / "d.parquet", [1])
    write(tmp_path / "e.jsonl", "")
    with pytest.raises(BrokenInput, match=r"a.jsonl, line 2: no 'text' .--text_key.* among id"):
        read(path)
    with pytest.raises(BrokenInput, match=r"c.parquet: 2 columns 'text' .* among text, text"):
        read(tmp_path / "c.parquet")
    counts = CorpusCounts()
    assert read(tmp_path, skip_broken=True, counts=counts) == ["a", "b"]
    assert (counts.n_broken, counts.empty) == (5, 2)
    assert "line 3: expected text in 'text', got a int" in counts.broken[1]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "hf").mkdir()
    write_parquet(tmp_path / "hf" / "a.parquet", ["x"], name="body")
    with pytest.raises(BrokenInput, match=r"row 0: no 'text'"):
        read(f"hf:{tmp_path / 'hf'}")


def test_the_files_of_this_project_are_not_text(tmp_path):
    write(tmp_path / "a.txt", "text")
    files = [("merges.txt", "vocab.json"), ("metrics.jsonl", "run.json")]
    files += [("samples.jsonl", "run.json"), ("README.md", "model.safetensors")]
    for name, beside in files:
        write(tmp_path / name, lines({"text": "a row"}))
        assert len(read(tmp_path)) == 2  # until the other file is there
        write(tmp_path / beside, "{}")
        assert read(tmp_path) == ["text"] == read(tmp_path / "*.[tm]*")
        (tmp_path / beside).unlink()
        assert read(tmp_path / name) == ["a row"]
        (tmp_path / name).unlink()


def test_a_folder_of_save_to_disk_is_read_under_every_name(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "valid": rows.select([1])}).save_to_disk(
        str(tmp_path / "two")
    )
    for folder in ("one", "two"):
        assert read(tmp_path / folder) == read(f"hf:{tmp_path / folder}") == ["a", "b"]
    assert read(f"hf:{tmp_path / 'two'}:valid") == ["b"]
    before = identify_sources(str(tmp_path / "one"))
    os.utime(tmp_path / "one" / "state.json", ns=(1, 1))
    assert identify_sources(str(tmp_path / "one")) != before

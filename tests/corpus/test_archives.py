"""Archives as corpora: the same documents as unpacked, damage is named, nothing is followed."""

import bz2
import gc
import gzip
import io
import json
import lzma
import os
import random
import signal
import stat
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from test_documents import lines, read, read_parts, write, write_parquet

from algpt2.corpus import archives, listing
from algpt2.corpus.archives import TarStream
from algpt2.corpus.documents import documents
from algpt2.corpus.listing import list_parts
from algpt2.corpus.parts import Broken, BrokenInput, CorpusCounts, Reading
from algpt2.errors import UserError
from algpt2.system.parallel import TasksStopped

NAMES = ("a.txt", "b/c.md", "d", "x" * 90 + "/" + "y" * 90 + ".txt", "ü" * 60 + ".txt")
FILES = {name: f"{name} says {'word ' * i}".encode() for i, name in enumerate(NAMES)}
FILES |= {f"many/{i}.txt": f"text {i}".encode() * (i + 1) for i in range(40)}
TEXTS = [content.decode() for content in FILES.values()]


def pack_tar(files=FILES, format_=tarfile.PAX_FORMAT):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=format_) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return target.getvalue()


def pack_zip(files=FILES, method=zipfile.ZIP_DEFLATED):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def zstd(content):
    return pa.compress(content, codec="zstd", asbytes=True)


COMPRESSED = {
    ".tar": bytes, ".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.xz": lzma.compress,
    ".txz": lzma.compress, ".tar.zst": zstd, ".tar.bz2": bz2.compress, ".xz": lzma.compress,
    ".xsz": lzma.compress,
}  # fmt: skip


def nested(n=5, inner=lzma.compress, suffix="_data.xz"):
    """Like the archive of OpenWebText: a tar of compressed tars of texts."""
    inside = [{f"{i}-{j}.txt": f"text {i} {j}".encode() for j in range(6)} for i in range(n)]
    files = {f"owt/subset{i}{suffix}": inner(pack_tar(files)) for i, files in enumerate(inside)}
    return files, [text.decode() for files in inside for text in files.values()]


def part_texts(source, **reading):
    """The documents of each part read by itself."""
    parts = list(list_parts([str(source)]))
    read = [read_parts([part], counts=CorpusCounts(), **reading) for part in parts]
    return [[raw.decode() for raw in texts] for texts in read]


def flat(lists):
    return [text for texts in lists for text in texts]


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_gives_what_its_files_give(tmp_path, suffix, format_):
    path = write(tmp_path / f"a{suffix}", COMPRESSED[suffix](pack_tar(format_=format_)))
    counts = CorpusCounts()
    assert read(path, counts=counts) == TEXTS
    assert counts.files == counts.documents == len(FILES)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_gives_what_its_files_give(tmp_path, method, monkeypatch):
    path = write(tmp_path / "a.zip", pack_zip(method=method))
    assert read(path) == TEXTS
    monkeypatch.setattr(listing, "RUN_FILES", 7)
    parts = part_texts(path)
    assert len(parts) == -(-len(FILES) // 7) and flat(parts) == TEXTS


@pytest.mark.parametrize("inner", [lzma.compress, gzip.compress, bytes])
@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".zip"])
def test_archives_in_archives(tmp_path, suffix, inner):
    name = {lzma.compress: "_data.xz", gzip.compress: ".tgz", bytes: ".tar"}[inner]
    files, texts = nested(inner=inner, suffix=name)
    packed = pack_zip(files) if suffix == ".zip" else COMPRESSED[suffix](pack_tar(files))
    path = write(tmp_path / f"owt{suffix}", packed)
    assert read(path) == texts
    assert read(path, n_files=8) == texts[:8]
    parts = part_texts(path)
    assert flat(parts) == texts
    # In an outer archive that is not compressed each inner one can be read by another worker.
    assert len(parts) == (1 if suffix == ".tar.xz" else 5)


def test_a_tar_is_cut_into_runs_that_are_read_on_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "RUN_FILES", 10)
    path = write(tmp_path / "a.tar", pack_tar())
    parts = list(list_parts([str(path)]))
    assert [part.n_files for part in parts] == [10, 10, 10, 10, 5]
    assert flat(part_texts(path)) == TEXTS
    assert read(path, n_files=23) == TEXTS[:23]
    monkeypatch.setattr(listing, "RUN_BYTES", 300)
    assert len(list(list_parts([str(path)]))) > 10 and flat(part_texts(path)) == TEXTS


def test_tables_and_other_members(tmp_path):
    table = write_parquet(tmp_path / "t.parquet", ["row 3", "row 4"]).read_bytes()
    files = {
        "a.jsonl": lines({"text": "row 1"}).encode(),
        "b.jsonl.zst": zstd(lines({"text": "row 2"}).encode()),
        "c.parquet": table,
        "d.png": b"\x89PNG",
        "./e.txt": b"text",
        ".hidden/f.txt": b"hidden",
        "g/._h.txt": b"hidden",
        "i.txt.xz": lzma.compress(b"compressed"),
    }
    texts = ["row 1", "row 2", "row 3", "row 4", "text", "compressed"]
    for name, packed in {"a.tar": pack_tar(files), "a.zip": pack_zip(files)}.items():
        counts = CorpusCounts()
        assert read(write(tmp_path / name, packed), counts=counts) == texts
        assert counts.other_files == {".png": 1}
        assert counts.files == 5


def test_line_by_line_in_an_archive(tmp_path):
    path = write(tmp_path / "a.tar", pack_tar({"a.txt": b"one\ntwo\n", "b.txt": b"three"}))
    assert read(path, line_by_line=True) == ["one", "two", "three"]


def test_a_folder_and_a_glob_take_archives_in_their_order(tmp_path):
    write(tmp_path / "f" / "a.txt", "first")
    write(tmp_path / "f" / "b.tar.xz", lzma.compress(pack_tar({"x.txt": b"second"})))
    write(tmp_path / "f" / "c.zip", pack_zip({"y.txt": b"third"}))
    write(tmp_path / "f" / "d.xz", lzma.compress(b"fourth, text without a suffix"))
    texts = ["first", "second", "third", "fourth, text without a suffix"]
    assert read(tmp_path / "f") == texts and read(f"{tmp_path}/f/*") == texts


def test_concatenated_archives_and_xz_streams_are_read_to_their_end(tmp_path):
    two = pack_tar({"a.txt": b"a"}) + pack_tar({"b.txt": b"b"})
    assert read(write(tmp_path / "a.tar", two)) == ["a", "b"]
    streams = lzma.compress(two[:700]) + b"\0" * 8 + lzma.compress(two[700:]) + b"\0" * 4
    assert read(write(tmp_path / "b.tar.xz", streams)) == ["a", "b"]
    assert read(write(tmp_path / "c.tar.gz", gzip.compress(two[:9]) + gzip.compress(two[9:]))) == [
        "a", "b"
    ]  # fmt: skip


def test_padding_between_xz_streams_may_be_longer_than_a_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "BUFFER_BYTES", 64)
    content = pack_tar()
    streams = lzma.compress(content[:700]) + bytes(400) + lzma.compress(content[700:])
    assert read(write(tmp_path / "a.tar.xz", streams)) == TEXTS


def test_random_archives_agree_with_tarfile(tmp_path):
    draw = random.Random(0)
    for round_ in range(20):
        files = {}
        for i in range(draw.randrange(1, 30)):
            name = "/".join("ab é"[i % 4] * draw.randrange(1, 120) for _ in range(3)) + f"{i}.txt"
            files[name] = draw.randbytes(draw.choice([0, 1, 511, 512, 513, 3000]))
        content = pack_tar(files, draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
        stream = TarStream(io.BytesIO(content), "a.tar")
        ours = {member.name: stream.read() for member in stream}
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            assert ours == {m.name: tar.extractfile(m).read() for m in tar} == files, round_


def test_a_size_in_binary_or_in_a_pax_header(tmp_path):
    info = tarfile.TarInfo("big.txt")
    info.size = 9 << 30
    for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        header = info.tobuf(format_)
        path = tmp_path / "big.tar"
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + info.size + 1024)  # sparse: takes no space
        with path.open("rb", buffering=4096) as file:
            (member,) = TarStream(file, "big.tar")
        assert (member.name, member.size) == ("big.txt", 9 << 30)


# --- what is not followed ------------------------------------------------------------------------


def test_links_devices_and_paths_that_lead_out_are_never_followed(tmp_path):
    secret = write(tmp_path / "secret.txt", "secret")
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, kind in {
            "soft.txt": tarfile.SYMTYPE, "hard.txt": tarfile.LNKTYPE, "pipe.txt": tarfile.FIFOTYPE,
            "device.txt": tarfile.CHRTYPE, "folder": tarfile.DIRTYPE,
        }.items():  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        for name in ("/etc/passwd", "../../up.txt", str(secret)):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"bytes"))
    path = write(tmp_path / "corpus" / "a.tar", target.getvalue())
    before = sorted(tmp_path.rglob("*"))
    counts = CorpusCounts()
    assert read(path, counts=counts) == ["bytes"] * 3
    assert counts.other_files == {"(link)": 2, "(device)": 1, "(pipe)": 1}
    assert sorted(tmp_path.rglob("*")) == before and secret.read_text() == "secret"


def test_a_link_in_a_zip_is_not_text(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("link.txt")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
        archive.writestr("a.txt", "text")
    counts = CorpusCounts()
    assert read(path, counts=counts) == ["text"] and counts.other_files == {"(link)": 1}


def test_archives_in_archives_end_somewhere(tmp_path):
    content = pack_tar({"a.txt": b"deep"})
    for _ in range(8):
        content = pack_tar({"a.tar": content})
    with pytest.raises(BrokenInput, match="more than 4 archives in one another"):
        read(write(tmp_path / "a.tar", content))


# --- damage --------------------------------------------------------------------------------------


def cut(content):
    return content[: len(content) // 2]


def flip(content, at=0.6):
    at = int(len(content) * at)
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tar", cut(pack_tar()), r"a.tar, byte [\d,]+: cut off"),
        ("a.tar", pack_tar()[: 4 * 512], r"a.tar, byte 2,048: cut off"),  # between two members
        ("a.tar", flip(pack_tar(), 0.0), r"a.tar, byte 0: no tar header"),
        ("a.tar", b"no archive" * 200, r"a.tar, byte 0: no tar header"),
        ("a.tar", b"", r"a.tar, byte 0: cut off"),
        ("a.tar.xz", cut(lzma.compress(pack_tar())), "a.tar.xz: cannot be decompressed"),
        ("a.tar.xz", flip(lzma.compress(pack_tar())), "a.tar.xz: cannot be decompressed"),
        ("a.tar.gz", cut(gzip.compress(pack_tar())), "a.tar.gz: cannot be decompressed"),
        ("a.tar.gz", flip(gzip.compress(pack_tar())), "a.tar.gz"),
        ("a.tar.zst", cut(zstd(os.urandom(9999))), "a.tar.zst"),
        ("a.tar.bz2", cut(bz2.compress(pack_tar())), "a.tar.bz2: cannot be decompressed"),
        ("a.tar.xz", b"", "a.tar.xz: cannot be decompressed .it is empty"),
        ("a.tar.xz", lzma.compress(pack_tar()) + b"garbage", "a.tar.xz: cannot be decompressed"),
        ("a.zip", cut(pack_zip()), "a.zip: not a zip file that can be read"),
        ("a.zip", flip(pack_zip({"a.txt": os.urandom(999)}), 0.5), r"a.zip, byte 0: a.txt: .*CRC"),
    ],
)  # fmt: skip
def test_damage_is_an_error_that_names_the_archive_and_the_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(BrokenInput, match=f"{message}.*--skip_broken"):
        read(path)


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz", ".zip"])
@pytest.mark.parametrize("damage", [cut, flip])
def test_a_broken_inner_archive_costs_only_itself(tmp_path, suffix, damage, capsys):
    files, texts = nested()
    files["owt/subset2_data.xz"] = damage(files["owt/subset2_data.xz"])
    packed = pack_zip(files) if suffix == ".zip" else COMPRESSED[suffix](pack_tar(files))
    path = write(tmp_path / f"owt{suffix}", packed)
    with pytest.raises(BrokenInput, match=r"byte [\d,]+: owt/subset2_data.xz"):
        read(path)
    counts = CorpusCounts()
    found = read(path, skip_broken=True, counts=counts)
    others = [text for text in texts if not text.startswith("text 2")]
    assert [text for text in found if not text.startswith("text 2")] == others
    assert counts.n_broken == len(counts.broken) == 1 and "subset2_data.xz" in counts.broken[0]
    assert "1 broken inputs left out" in str(counts)
    assert "left out: " in capsys.readouterr().out


def test_what_comes_before_the_damage_stays(tmp_path):
    content = pack_tar()
    for name, packed in {"a.tar": content, "a.tar.zst": zstd(content)}.items():
        path = write(tmp_path / name, packed[: len(packed) * 2 // 3])
        counts = CorpusCounts()
        found = read(path, write(tmp_path / "b.txt", "behind"), skip_broken=True, counts=counts)
        assert found[-1] == "behind" and found[:-1] == TEXTS[: len(found) - 1]
        assert counts.n_broken == 1 and (len(found) > 10 or name != "a.tar")


def test_a_broken_outer_stream_is_not_blamed_on_a_member(tmp_path):
    inner = pack_tar({f"{i}.txt": os.urandom(1 << 15).hex().encode() for i in range(9)})
    packed = lzma.compress(pack_tar({"inner.tar": inner}))
    with pytest.raises(UserError, match=r"a.tar.xz: cannot be decompressed"):
        read(write(tmp_path / "a.tar.xz", cut(packed)))


def test_every_cut_is_noticed(tmp_path):
    content = pack_tar({"a.txt": b"a" * 700, "b.txt": b"b"})
    end = 5 * 512  # of the members; one block of zeros marks the end
    for size in [*range(0, end + 512, 64), end - 1, end + 1]:
        with pytest.raises(Broken):
            tar = TarStream(io.BytesIO(content[:size]), "a.tar")
            [tar.read() for _ in tar]
    tar = TarStream(io.BytesIO(content[: end + 512]), "a.tar")
    assert [tar.read() for _ in tar] == [b"a" * 700, b"b"]


def test_an_archive_behind_another_has_to_end_too(tmp_path):
    second = pack_tar({"b.txt": b"b"})[:1024]  # header and content
    with pytest.raises(BrokenInput, match=r"a.tar, byte [\d,]+: cut off"):
        read(write(tmp_path / "a.tar", pack_tar({"a.txt": b"a"}) + second))


def test_half_a_member_is_no_document():
    tar = TarStream(io.BytesIO(pack_tar({"a.txt": b"a" * 700})[: 512 + 600]), "a.tar")
    next(iter(tar))
    with pytest.raises(Broken, match=r"byte 0: a.txt is cut off"):
        tar.read()


def test_an_encrypted_member_is_broken_input(tmp_path):
    content = bytearray(pack_zip({"a.txt": b"secret"}, zipfile.ZIP_STORED))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(BrokenInput, match=r"a.txt: .*encrypted"):
        read(write(tmp_path / "a.zip", bytes(content)))


def test_an_archive_that_changes_after_it_was_listed_is_an_error(tmp_path):
    path = write(tmp_path / "a.tar", pack_tar())
    parts = list(list_parts([str(path)]))
    path.write_bytes(pack_tar(FILES | {"new.txt": b"new"}))
    with pytest.raises(UserError, match=r"a.tar has changed since the files were listed"):
        list(read_parts(parts, counts=CorpusCounts()))
    Path(path).unlink()
    with pytest.raises(UserError, match=r"a.tar has changed .* \(it is gone\)"):
        list(read_parts(parts, counts=CorpusCounts()))


# --- xz in a process of its own ------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """The processes that decompress, in the order of their start."""
    processes = []

    class Watched(archives._Process):
        def __init__(self, file):
            super().__init__(file)
            processes.append(self._process)

    monkeypatch.setattr(archives, "_Process", Watched)
    return processes


def test_a_sample_takes_no_process(tmp_path, started):
    path = write(tmp_path / "a.tar.xz", lzma.compress(pack_tar()))
    texts = read_parts(list_parts([str(path)]), is_sample=True, counts=CorpusCounts())
    assert next(texts).decode() == TEXTS[0] and not started


def test_a_process_that_is_killed_is_no_damage(tmp_path, started):
    path = write(tmp_path / "a.tar.xz", lzma.compress(pack_tar(FILES | {"z.txt": b"z" * 10**8})))
    texts = read_parts(list_parts([str(path)]), skip_broken=True, counts=CorpusCounts())
    next(texts)
    started[0].kill()
    with pytest.raises(TasksStopped, match=r"that decompresses .*a.tar.xz was killed"):
        list(texts)


def test_a_process_without_memory_is_no_damage(tmp_path, monkeypatch):
    script = tmp_path / "decompression.py"
    failing = (
        Path(archives.decompression.__file__)
        .read_text()
        .replace("content = self._decompressor.decompress(", "raise MemoryError; (")
    )
    script.write_text(failing)
    monkeypatch.setattr(archives.decompression, "__file__", str(script))
    path = write(tmp_path / "a.tar.xz", lzma.compress(pack_tar()))
    with pytest.raises(TasksStopped, match=r"killed or failed \(out of memory"):
        read(path, skip_broken=True)


def test_a_reader_that_stops_early_ends_the_process(tmp_path, started):
    path = write(tmp_path / "a.tar.xz", lzma.compress(pack_tar(FILES | {"z.txt": b"z" * 10**8})))
    texts = read_parts(list_parts([str(path)]), counts=CorpusCounts())
    next(texts)
    texts.close()
    gc.collect()
    assert started[0].returncode == -signal.SIGKILL


# --- every compression ---------------------------------------------------------------------------


def pack_lines(n):
    noise = random.Random(0)
    return [{"text": f"{noise.getrandbits(4000):x}"} for _ in range(n)]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_every_compression_keeps_what_comes_before_damage(tmp_path, suffix):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
    rows = pack_lines(2000)
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    whole = compress[suffix](raw)
    path = tmp_path / f"a.jsonl{suffix}"

    def texts(content, **reading):
        path.write_bytes(content)
        return list(documents(str(path), Reading(**reading)))

    assert texts(whole) == texts(whole + bytes(1000)) == [row["text"] for row in rows]
    assert len(texts(whole + bytes(700_000) + whole)) == 4000
    for damaged in (cut(whole), whole[:-4], whole + b"garbage behind"):
        with pytest.raises(BrokenInput, match="cannot be decompressed"):
            texts(damaged)
        expected = 2000 * (0.5 if damaged == cut(whole) else 1)
        lost = 900 if suffix == ".bz2" else 300  # bz2 has blocks of 900 kB
        kept = texts(damaged, skip_broken=True)
        assert expected - lost < len(kept) <= 2000
        assert kept == [row["text"] for row in rows[: len(kept)]]
    (tmp_path / "t.tar").write_bytes(pack_tar({f"b.jsonl{suffix}": cut(whole)}))
    assert len(list(documents(str(tmp_path / "t.tar"), Reading(skip_broken=True)))) > 100
    path = tmp_path / f"t.tar{suffix}"
    path.write_bytes(cut(compress[suffix](pack_tar({"b.jsonl": raw}))))
    assert len(list(documents(str(path), Reading(skip_broken=True)))) > 100
    path = tmp_path / f"a.jsonl{suffix}"
    with pytest.raises(BrokenInput, match=f"a.jsonl{suffix}.*it is empty"):
        texts(b"")


def test_zstd_with_a_window_of_2_gib_is_read(tmp_path):
    header = b"\x28\xb5\x2f\xfd" + b"\0" + bytes([(31 - 10) << 3])  # RFC 8878: no size, window
    content = b'{"text": "a"}\n'
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content  # the last, stored as it is
    (tmp_path / "a.jsonl.zst").write_bytes(header + block)
    assert list(documents(str(tmp_path))) == ["a"]

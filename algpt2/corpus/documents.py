"""The one reader of documents: a deterministic stream of valid Unicode from anywhere text lies.

    folder | file | glob     text files (one document each), .jsonl, .parquet; .gz, .zst, .xz, .bz2
                             of them; .tar, .tar.gz (.xz, .zst, .bz2) and .zip of all these
    hf:NAME[:SPLIT]          a dataset of the Hugging Face hub or a local folder, streamed; also
                             hf:NAME:CONFIG:SPLIT
    docs:[train|valid|all]   the docstrings of the installed packages: text without a download

`documents` reads sources; `read_batches` reads parts that `list_parts` cut, in any process. Nothing
is skipped silently: `CorpusCounts` counts all that is left out.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from ..errors import UserError
from ..system.console import log
from .listing import list_parts
from .parts import BYTES, CorpusCounts, Part, Reading
from .readers import PartReader, RawTexts
from .words import decoded, is_blank, is_shorter, unix_line_ends


def documents(
    sources: str | Sequence[str],
    reading: Reading = Reading(),  # noqa: B008  (it is frozen)
    *,
    n_files: int | None = None,
    counts: CorpusCounts | None = None,
) -> Iterator[str]:
    """The documents of `sources` in a fixed order: valid Unicode, never empty.

    A text file is a document (with `line_by_line` each line is); so is the `text_key` of each row
    of a table. At most `n_files` files are read, in archives too; a document of hf: and docs:
    counts as a file.

    Raises:
        UserError: in this call, a source that does not exist or holds no text; while the stream is
            read, broken files (`skip_broken` counts them instead), files that have changed since,
            and a corpus without any document.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    for source in sources:  # all of them, before the first is read for hours
        next(list_parts([source], reading))
    return _documents(sources, reading, n_files, CorpusCounts() if counts is None else counts)


def _documents(
    sources: Sequence[str], reading: Reading, n_files: int | None, counts: CorpusCounts
) -> Iterator[str]:
    before = counts.documents
    parts = list_parts(sources, reading, counts)
    for (text,) in read_batches(parts, reading, counts, limit=n_files, batch_bytes=1):
        yield text.decode()
    if counts.documents == before:
        raise no_document(sources, counts)


def no_document(sources: Sequence[str], counts: CorpusCounts) -> UserError:
    """The error of a corpus that was read and has no document."""
    return UserError(f"no document in {', '.join(sources)}: {counts}")


def read_batches(
    parts: Iterable[Part],
    reading: Reading,
    counts: CorpusCounts,
    *,
    limit: int | None = None,
    batch_bytes: int,
) -> Iterator[list[bytes]]:
    """The documents of some parts as UTF-8, counted; each batch ends with the document that takes
    it to `batch_bytes`.

    At most `limit` files are read, or documents of hf: and docs:. `reading.line_by_line` has to be
    that of `list_parts`. Documents are bytes: a string with an emoji takes four times the memory.
    """
    batch, n_bytes = [], 0
    for text in _read(parts, reading, counts, limit):
        batch.append(text)
        n_bytes += len(text)
        if n_bytes >= batch_bytes:
            counts.add_texts(batch, reading.end_of_text)
            yield batch
            batch, n_bytes = [], 0
    if batch:
        counts.add_texts(batch, reading.end_of_text)
        yield batch


def _read(
    parts: Iterable[Part], reading: Reading, counts: CorpusCounts, limit: int | None
) -> Iterator[bytes]:
    reader = PartReader(reading, counts, limit)
    n_logged = len(counts.broken)
    for part in parts:
        if reader.left == 0 and part.n_files != 0:  # 0: the part continues a file
            break
        texts = _clean(reader.read(part), reading, counts)
        if part.is_file or reader.left is None:
            yield from texts
        else:
            for text in itertools.islice(texts, reader.left):
                reader.left -= 1
                yield text
        for message in counts.broken[n_logged:]:
            log(f"left out: {message}")
        n_logged = len(counts.broken)


def _clean(raw_texts: RawTexts, reading: Reading, counts: CorpusCounts) -> Iterator[bytes]:
    """Documents out of raw texts: valid UTF-8, not blank, not too short."""
    if reading.document_mark:
        cut = functools.partial(_between_marks, re.escape(reading.document_mark.encode()))
        raw_texts = itertools.chain.from_iterable(map(cut, raw_texts))
    if reading.line_by_line:
        raw_texts = itertools.chain.from_iterable(map(_lines, raw_texts))
    for raw in raw_texts:
        text = _utf8(raw, counts)
        del raw  # of gigabytes, perhaps
        if is_blank(text):
            counts.empty += 1
        elif reading.min_length and is_shorter(text, reading.min_length):
            counts.short += 1
        else:
            yield text
        del text  # before the next is read


def _utf8(raw: bytes | str | None, counts: CorpusCounts) -> bytes:
    """A raw text as valid UTF-8; lone surrogates stand for bad bytes."""
    try:
        if not isinstance(raw, bytes):
            return (raw or "").encode()
        if not raw.isascii():
            for _ in decoded(raw):
                pass
        return raw
    except UnicodeError:
        text = raw.decode(*BYTES) if isinstance(raw, bytes) else raw
        counts.undecodable += 1
        return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text).encode()


def _raw_bytes(raw: bytes | str | None) -> bytes:
    return raw if isinstance(raw, bytes) else (raw or "").encode("utf-8", "surrogatepass")


def _between_marks(mark: bytes, raw: bytes | str | None) -> Iterator[bytes]:
    """The documents between marks, each without the line end next to a mark."""
    raw, start = _raw_bytes(raw), 0
    for match in re.finditer(rb"\r?\n?%b\r?\n?" % mark, raw):
        if start < match.start():
            yield raw[start : match.start()]
        start = match.end()
    if start < len(raw) or not start:
        yield raw[start:]


def _lines(raw: bytes | str | None) -> list[bytes]:
    raw = _raw_bytes(raw)
    return unix_line_ends(raw).removesuffix(b"\n").split(b"\n")


def log_counts(counts: CorpusCounts, end_of_text: str, note: str = "") -> None:
    """Say what was read, and warn of end-of-text marks that were read as ordinary text."""
    log(f"read {counts}{note}")
    if counts.end_marks:
        log(
            f"warning: {counts.end_marks:,} literal {end_of_text} are encoded as ordinary"
            f" characters; if they stand between documents: --document_mark '{end_of_text}'"
        )


def first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The texts up to `max_bytes` of UTF-8; the last text is cut there."""
    left = max_bytes
    for text in texts:
        raw = text.encode()
        yield text if len(raw) <= left else raw[:left].decode(errors="ignore")
        left -= len(raw)
        if left <= 0:
            return

"""Text to ids at the speed of the disk: gigatoken, never trusted before `tokenizers` agreed.

gigatoken encodes 300 to 700 MB/s of English per core, `tokenizers` 2 (`benchmarks/data.py`). Three
precautions make it safe:

* Same ids: `choose_encoder` compares the ids of both on a sample of the corpus.
* Same Unicode: gigatoken follows a newer version than Python; `tokenizers` encodes each text with a
  code point that is unassigned in Python's.
* Memory: gigatoken keeps every word, 7 GB for 1 GB of text whose words never repeat. `FastEncoder`
  loads it again when the process has grown by `CACHE_BYTES`, and cuts long documents into pieces.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from ..system.console import log
from ..system.memory import return_freed_memory
from ..tokenization_algpt2 import TextTokenizer
from .detokenizers import detokenize

ENCODERS = ("gigatoken", "tokenizers")  # by name

CACHE_BYTES = 112 << 20  # growth of the process after which the encoder is loaded again
ENCODED_BYTES = 1 << 30  # bytes encoded, if the system does not tell the size of a process
CHECK_BYTES = 4 << 20  # bytes encoded between two checks of the size of the process
PIECE_BYTES = 1 << 24  # a longer document is encoded in pieces

Encode = Callable[[Sequence[bytes]], list[np.ndarray]]  # texts as UTF-8 to the ids of each


class FastEncoder:
    """gigatoken as a function: `encoder(texts)` gives the ids of each text (UTF-8), uint16 or
    uint32 (n_tokens,).

    Control codes written out in the text are ordinary text, as in `TextTokenizer`.

    Raises:
        ValueError: the tokenizer has something that gigatoken or this class cannot do.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        # The model is last and has megabytes: it is neither parsed nor written again.
        head, key, model = tokenizer.to_json().partition(',"model":')
        if not key:
            raise ValueError("the model is not last in its tokenizer.json")
        content = json.loads(head + "}")
        if not all(token["special"] for token in content["added_tokens"]):
            raise ValueError("it has added tokens that are found in ordinary text")
        self._oracle = tokenizer
        content["added_tokens"], content["post_processor"] = [], None
        before = content["pre_tokenizer"] or {}
        self._can_cut = before.get("type") == "ByteLevel" and not before["add_prefix_space"]
        self._json = json.dumps(content).removesuffix("}") + key + model
        self._encoder = None
        self._load()

    def __call__(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        if max(map(len, texts)) > PIECE_BYTES:
            return [self._in_pieces(text) for text in texts]
        # All texts in a single check: faster than text by text.
        if has_unassigned(b"".join(text for text in texts if not text.isascii())):
            return [self._encode(text) for text in texts]
        self._look_at_memory(sum(map(len, texts)))
        return [self._encoder.encode(text) for text in texts]

    def _in_pieces(self, text: bytes) -> np.ndarray:
        if not self._can_cut or len(text) <= PIECE_BYTES:
            return self._encode(text)
        ids = bytearray()  # grows in place, so that gigabytes are not copied
        for piece in _pieces(text):
            ids += self._encode(piece).astype(self._oracle.dtype).data
        return np.frombuffer(ids, self._oracle.dtype)

    def _encode(self, text: bytes) -> np.ndarray:
        if not text.isascii() and has_unassigned(text):
            return self._oracle.encode_batch([text.decode()])[0]
        self._look_at_memory(len(text))
        return self._encoder.encode(text)

    def _look_at_memory(self, n_bytes: int) -> None:
        """Load the encoder again if the process has grown too much; `n_bytes` come next."""
        self._bytes += n_bytes
        if self._bytes >= self._next_check:
            self._next_check = self._bytes + CHECK_BYTES
            grown = _process_bytes() - self._start_bytes
            if grown > CACHE_BYTES or (not self._start_bytes and self._bytes > ENCODED_BYTES):
                self._load()

    def _load(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        if self._encoder is not None:
            # Free the old encoder first: else each new encoder may grow by as much as all before.
            self._encoder = None
            return_freed_memory()
        self._encoder = load_hf_json(self._json)
        self._start_bytes, self._bytes, self._next_check = _process_bytes(), 0, CHECK_BYTES


def has_unassigned(text: bytes) -> bool:
    """Whether UTF-8 has a code point that is unassigned in Python's Unicode (14.0 in Python 3.11):
    libraries of different versions disagree whether it is a letter."""
    # Without ASCII, which is dropped at 1 GB/s, most texts are short. Each character once.
    new = set(text.translate(None, _ASCII).decode()) - _assigned
    if any(unicodedata.category(character) == "Cn" for character in new):
        return True
    _assigned.update(new)
    return False


_ASCII = bytes(range(128))
_assigned: set[str] = set()  # the assigned characters met so far


def _pieces(text: bytes) -> Iterable[bytes]:
    """Cut before spaces between two letters, where GPT-2's pattern always begins a new word."""
    boundary = re.compile(rb"(?<=[A-Za-z]) (?=[A-Za-z])")
    start = 0
    while start < len(text):
        cut = boundary.search(text, start + PIECE_BYTES)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _process_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def choose_encoder(tokenizer: TextTokenizer, texts: Iterable[bytes]) -> dict[str, str | int]:
    """The encoder of a corpus, and how it was compared with `tokenizers`: JSON for the manifest.

    Args:
        texts: a sample of the corpus, each valid UTF-8.
    """
    oracle = {"name": "tokenizers", "version": metadata.version("tokenizers")}
    try:
        encoder = build_encoder(tokenizer, "gigatoken", None)  # cached: the tasks call it so
        texts = list(texts)
        expected = tokenizer.encode_batch([text.decode() for text in texts])  # on all cores
        pairs = zip(encoder(texts) if texts else [], expected, strict=True)
        differences = sum(not np.array_equal(ids, expected_ids) for ids, expected_ids in pairs)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        if not type(error).__module__.startswith(("pyo3", "builtins")):
            raise
        log(f"gigatoken cannot be used ({error}): encoding with tokenizers, 100 times slower")
        return oracle | {"documents_compared": 0, "bytes_compared": 0, "differences": 0}
    compared = {
        "documents_compared": len(texts),
        "bytes_compared": sum(map(len, texts)),
        "differences": differences,
    }
    if differences:
        log(
            f"warning: gigatoken and tokenizers differ on {differences:,} of {len(texts):,}"
            " documents of this text: encoding with tokenizers, 100 times slower"
        )
        return oracle | compared
    return {"name": "gigatoken", "version": metadata.version("gigatoken"), **compared}


@functools.lru_cache(1)  # building takes half of the time of a small corpus
def build_encoder(tokenizer: TextTokenizer, name: str, detokenizer: str | None = None) -> Encode:
    """The encoder of that name, cached: the words that it knows make it faster.

    Args:
        detokenizer: a name of `DETOKENIZERS`; it changes each text before encoding.
    """
    if detokenizer is not None:
        encode = build_encoder.__wrapped__(tokenizer, name)
        return lambda texts: encode([detokenize(text, detokenizer) for text in texts])
    if name == "gigatoken":
        return FastEncoder(tokenizer)
    return lambda texts: tokenizer.encode_batch([text.decode() for text in texts])

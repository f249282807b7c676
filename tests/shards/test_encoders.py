"""The fast encoder gives the ids of `tokenizers`, or is not used."""

import importlib.util
import itertools
import json
from pathlib import Path
from unicodedata import category

import numpy as np
import pytest

from algpt2.corpus import docstrings
from algpt2.shards import encoders
from algpt2.shards.encoders import FastEncoder, build_encoder, choose_encoder
from algpt2.tokenization_algpt2 import TextTokenizer, load_tokenizer

# Code points that meet in GPT-2's pattern: letters, digits, spaces, marks of many scripts.
POOLS = [range(32, 127), range(0x250), range(0x370, 0x600), range(0x900, 0xE00),
         range(0x2000, 0x2100), range(0x3000, 0x3100), range(0x4E00, 0x4F00),
         range(0x1F300, 0x1F700), range(0xD7FF), range(0xE000, 0x110000),
         (9, 10, 13, 32, 32, 39, 0xA0, 0x85, 0x2028, 0x1C, 0x1F, 0x200B, 0xFEFF)]  # fmt: skip
KINDS = {}  # Unicode's category of characters: its code points
for code in range(0x110000):
    KINDS.setdefault(category(chr(code)), []).append(code)
del KINDS["Cn"], KINDS["Cs"]  # unassigned code points and surrogates
POOLS += KINDS.values()
WORDS = ["'s", "'LL", "don't", " ", "  ", "\n\n", "\r\n", "<|endoftext|>", "١٢", "e\u0301"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("algpt2-tokenizer")


def random_texts(rng, n):
    """Texts of up to 12 runs, each of one pool."""
    pools = [np.array(pool) for pool in POOLS]

    def run():
        if rng.random() < 0.15:
            return WORDS[rng.integers(len(WORDS))]
        pool = pools[rng.integers(len(pools))]
        return "".join(map(chr, pool[rng.integers(len(pool), size=rng.integers(1, 6))]))

    return ["".join(run() for _ in range(rng.integers(0, 8))) for _ in range(n)]


def differences(encode, tokenizer, texts):
    pairs = zip(texts, tokenizer.encode_batch(texts), strict=True)
    found = encode([text.encode() for text in texts])
    return [
        t
        for (t, expected), ids in zip(pairs, found, strict=True)
        if not np.array_equal(expected, ids)
    ]


def test_the_ids_of_every_character(tokenizer):
    characters, encoder = [*map(chr, itertools.chain(*KINDS.values()))], FastEncoder(tokenizer)
    for pattern in ("{}", "a{}1", " {}."):
        texts = [
            "".join(map(pattern.format, characters[i : i + 100]))
            for i in range(0, len(characters), 100)
        ]
        assert differences(encoder, tokenizer, texts) == []


def test_the_ids_of_random_texts_in_which_all_kinds_of_characters_meet(tokenizer):
    rng, encoder, met = np.random.default_rng(0), FastEncoder(tokenizer), set()
    for _ in range(10):
        texts = random_texts(rng, 2_000)
        assert differences(encoder, tokenizer, texts) == []
        for kinds in ([category(c) for c in text] for text in texts):
            if "Cn" not in kinds:  # else the encoder leaves the text to `tokenizers`
                met.update(itertools.pairwise(kinds))
    assert met == set(itertools.product(KINDS, repeat=2))


def docstrings_of_all_packages():
    """Every docstring that is not ASCII, and all docstrings of every 40th file: a sixth of the
    time of reading and encoding all."""
    texts = {}
    for package in docstrings.PACKAGES:
        folders = importlib.util.find_spec(package).submodule_search_locations
        paths = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
        for i, path in enumerate(paths):
            source = path.read_bytes()
            if i % 40 == 0 or not source.partition(b'"""')[2].isascii():
                found = docstrings._file_docstrings(source)
                texts |= {text: None for text in found if i % 40 == 0 or not text.isascii()}
    return list(texts)


def test_the_ids_of_docstrings(tokenizer):
    texts = docstrings_of_all_packages()
    assert len(texts) > 1000 and sum(not text.isascii() for text in texts) > 400
    assert differences(FastEncoder(tokenizer), tokenizer, texts) == []


def test_a_control_code_in_the_text_is_text(tokenizer):
    ids = FastEncoder(tokenizer)([b"a<|endoftext|>b"])[0]
    assert tokenizer.eot_id not in ids.tolist()
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_a_long_document_in_pieces_has_the_same_ids(tokenizer, monkeypatch):
    sources = sorted(Path(encoders.__file__).parent.glob("*.py"))
    text = "".join(path.read_text() for path in sources) + "0" * 500
    encoder = FastEncoder(tokenizer)
    whole = encoder([text.encode()])[0]
    for size in (37, 1000):
        monkeypatch.setattr(encoders, "PIECE_BYTES", size)
        assert len(list(encoders._pieces(text.encode()))) > 20
        assert np.array_equal(encoder([text.encode()])[0], whole)


def test_the_encoder_is_made_anew_when_its_process_has_grown(tokenizer, monkeypatch):
    encoder = FastEncoder(tokenizer)
    first, size = encoder._encoder, 100
    monkeypatch.setattr(encoders, "_process_bytes", lambda: size)
    monkeypatch.setattr(encoders, "CHECK_BYTES", 10)
    encoder._load()
    first = encoder._encoder
    text = b"some text" * 10
    expected = encoder([text])[0]
    assert encoder._encoder is first
    size += encoders.CACHE_BYTES + 1
    assert np.array_equal(encoder([text])[0], expected)
    assert encoder._encoder is not first


def test_the_choice_is_recorded(tokenizer):
    choice = choose_encoder(tokenizer, [b"a", b"bc"])
    compared = (choice["documents_compared"], choice["bytes_compared"], choice["differences"])
    assert (choice["name"], compared) == ("gigatoken", (2, 3, 0))


def test_an_encoder_that_differs_is_not_used(tokenizer, monkeypatch, capsys):
    class Wrong(FastEncoder):
        def __call__(self, texts):
            return [ids[::-1] for ids in super().__call__(texts)]

    monkeypatch.setattr(encoders, "FastEncoder", Wrong)
    build_encoder.cache_clear()
    choice = choose_encoder(tokenizer, [b"several words", b"a"])
    assert (choice["name"], choice["differences"]) == ("tokenizers", 1)
    assert "differ on 1 of 2 documents" in capsys.readouterr().out
    build_encoder.cache_clear()
    encode = build_encoder(tokenizer, choice["name"])
    assert np.array_equal(
        encode([b"several words"])[0], tokenizer.encode_batch(["several words"])[0]
    )


def test_a_tokenizer_that_it_does_not_know_is_left_to_tokenizers(tokenizer, capsys):
    class Unknown(TextTokenizer):
        def to_json(self):
            content = json.loads(super().to_json())
            content["added_tokens"][0]["special"] = False
            return json.dumps(content, separators=(",", ":"))

    unknown = Unknown(tokenizer._tokenizer, tokenizer.folder, "<|endoftext|>")
    assert choose_encoder(unknown, [b"a"])["name"] == "tokenizers"
    assert "gigatoken cannot be used (it has added tokens" in capsys.readouterr().out

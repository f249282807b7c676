"""tokenization_algpt2.py: the same ids everywhere, no loss, nothing overwritten."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors

from algpt2 import tokenization_algpt2 as tokenization
from algpt2.errors import UserError
from algpt2.tokenization_algpt2 import END_OF_TEXT, load_tokenizer, save, train

ROOT = Path(__file__).resolve().parent.parent
CODES = ("<|title|>", END_OF_TEXT, "<|pad|>")


def make_texts(seed=0, n=400):
    """Documents of made-up words, so that a few hundred merges are there to be learnt."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(400)]
    return [" ".join(draw.choices(words, k=60)) + ".\n" for _ in range(n)]


def random_unicode(n, seed=1):
    draw = random.Random(seed)

    def character():
        top = draw.choice([0x7F, 0x24F, 0x3000, 0xD7FF, 0x10FFFF])
        code = draw.randint(0, top)
        return "\ufffd" if 0xD800 <= code <= 0xDFFF else chr(code)

    return ["".join(character() for _ in range(draw.randint(0, 40))) for _ in range(n)]


PLAIN = [
    *random_unicode(300),
    *make_texts(seed=3, n=5),
    "",
    " ",
    "  leading and trailing  ",
    "tabs\t\tand\r\nline ends\n\n\n",
    "I'm we'll they've 3.14159 __init__",
    "Grüße, 你好, \N{GRINNING FACE}\u200d\u0301",
    "\x00\x7f\ufeff",
]
WITH_CODES = [END_OF_TEXT, f"a {END_OF_TEXT} b{END_OF_TEXT}", "<|title|>x", "<|endoftext", "|>"]


@pytest.fixture(scope="module")
def trained():
    return train(make_texts(), vocab_size=400, control_codes=CODES)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / "bpe"
    assert save(trained, folder)
    return folder


def ids(tokenizer, texts):
    return [array.tolist() for array in tokenizer.encode_batch(texts)]


# --- training ------------------------------------------------------------------------------------


def test_end_of_text_has_the_last_id_and_the_other_codes_come_before_it(trained):
    assert trained.get_vocab_size() == 400
    assert [trained.id_to_token(i) for i in (397, 398, 399)] == [
        "<|title|>",
        "<|pad|>",
        END_OF_TEXT,
    ]
    assert sorted(trained.get_vocab().values()) == list(range(400))
    without = train(make_texts(), vocab_size=300, control_codes=["<|title|>"])
    assert (without.token_to_id("<|title|>"), without.token_to_id(END_OF_TEXT)) == (298, 299)


def test_all_bytes_are_in_the_vocabulary(trained):
    tokens = [trained.id_to_token(i) for i in range(256)]
    assert len(set(tokens)) == 256 and all(len(token) == 1 for token in tokens)


def test_the_same_text_gives_the_same_files_in_other_processes_with_other_threads(tmp_path):
    code = """
import sys
from test_tokenization import CODES, make_texts, save, train
save(train(iter(make_texts()), vocab_size=500, control_codes=CODES), sys.argv[1])
"""
    for threads in ("1", "3"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads,
                                    "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}  # fmt: skip
        command = [sys.executable, "-c", code, str(tmp_path / threads)]
        subprocess.run(command, env=environment, check=True)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


def test_text_too_small_for_the_vocabulary_says_how_many_entries_it_yields():
    with pytest.raises(UserError, match=r"of 5,000: it yields 258 entries"):
        train(["aa bb aa"], vocab_size=5000)
    assert train(["aa bb aa"], vocab_size=258).get_vocab_size() == 258


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 256}, "vocabulary of 256 is too small: expected at least 257"),
        ({"vocab_size": 258, "control_codes": CODES}, "expected at least 259"),
        ({"vocab_size": 259, "control_codes": ["aa"]}, "control code 'aa' is an ordinary word"),
    ],
)
def test_vocabularies_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        train(["aa aa aa"], **options)


def test_errors_of_the_corpus_pass_through_the_trainer():
    def texts():
        yield "a text"
        raise UserError("line 2 is broken")

    with pytest.raises(UserError, match="line 2 is broken"):
        train(texts(), vocab_size=300)


# --- text to ids and back ------------------------------------------------------------------------


def test_every_text_comes_back_from_its_ids(folder):
    tokenizer = load_tokenizer(str(folder))
    texts = PLAIN + WITH_CODES
    arrays = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(array) for array in arrays] == texts
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)} == {np.dtype(tokenizer.dtype)}
    assert len(tokenizer.encode_batch(make_texts(n=1))[0]) < 0.7 * len(make_texts(n=1)[0])


def test_control_codes_written_in_a_text_are_text(folder):
    tokenizer = load_tokenizer(str(folder))
    for text, row in zip(WITH_CODES, ids(tokenizer, WITH_CODES), strict=True):
        assert max(row) < 397, text
    assert tokenizer.decode([tokenizer.eot_id, 397]) == END_OF_TEXT + "<|title|>"


def test_ids_beyond_uint16_get_uint32(tmp_path):
    vocab = {f"t{i}": i for i in range(2**16 - 1)} | {END_OF_TEXT: 2**16 - 1}
    for n_more, dtype in ((0, np.uint16), (1, np.uint32)):
        more = {f"more{i}": 2**16 + i for i in range(n_more)}
        Tokenizer(models.BPE(vocab | more, [])).save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(str(tmp_path))
        assert (tokenizer.vocab_size, tokenizer.dtype) == (2**16 + n_more, dtype)


# --- transformers --------------------------------------------------------------------------------


def test_auto_tokenizer_loads_the_folder_and_gives_the_same_ids(folder):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(folder)
    assert (len(auto), auto.model_max_length, auto.eos_token_id) == (400, 1024, 399)
    assert auto.bos_token_id == 399 and auto.pad_token is None
    assert auto("a" * 5)["input_ids"] and auto.all_special_tokens.count("<|title|>") == 1
    assert type(auto).__name__ == "GPT2Tokenizer"
    assert auto(PLAIN)["input_ids"] == ids(load_tokenizer(str(folder)), PLAIN)
    assert auto.decode(auto(" a b .")["input_ids"]) == " a b ."
    assert auto(END_OF_TEXT)["input_ids"] == [399]  # there a control code, here text


def test_auto_tokenizer_loads_what_a_text_tokenizer_saved(folder, old_folder, tmp_path):
    from transformers import AutoTokenizer

    for source in (folder, old_folder):
        load_tokenizer(str(source)).save(tmp_path / source.name)
        auto = AutoTokenizer.from_pretrained(tmp_path / source.name)
        assert auto(PLAIN)["input_ids"] == ids(load_tokenizer(str(folder)), PLAIN)
        assert (auto.eos_token_id, auto.model_max_length) == (399, 1024)
        saved = load_tokenizer(str(tmp_path / source.name))
        assert saved.fingerprint == load_tokenizer(str(source)).fingerprint


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def old_folder(folder, tmp_path):
    """GPT-2's two files of 2019: vocab.json and merges.txt."""
    old = tmp_path / "old"
    old.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (old / name).write_bytes((folder / name).read_bytes())
    return old


def test_the_two_files_of_old_folders_are_enough(folder, old_folder):
    old, new = load_tokenizer(str(old_folder)), load_tokenizer(str(folder))
    assert (old.vocab_size, old.eot_id) == (400, 399)
    assert ids(old, PLAIN + WITH_CODES) == ids(new, PLAIN + WITH_CODES)


def test_end_of_text_is_found_wherever_the_vocabulary_has_it(old_folder):
    vocab = json.loads((old_folder / "vocab.json").read_text())
    vocab = {token: (index + 1) % 400 for token, index in vocab.items()}  # as in 2020: id 0
    (old_folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = load_tokenizer(str(old_folder))
    assert tokenizer.eot_id == 0
    assert [tokenizer.decode(array) for array in tokenizer.encode_batch(PLAIN)] == PLAIN


def test_end_of_text_of_another_model_is_its_eos_token(tmp_path):
    Tokenizer(models.BPE({"a": 0, "</s>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"^\S+: the vocabulary has no <\|endoftext\|> and no eos"):
        load_tokenizer(str(tmp_path))
    for eos in ("</s>", {"content": "</s>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(str(tmp_path)).eot_id == 1


def test_truncation_and_padding_in_a_tokenizer_json_are_ignored(folder, tmp_path):
    foreign = Tokenizer.from_file(str(folder / "tokenizer.json"))
    foreign.enable_truncation(4)
    foreign.enable_padding(length=8)
    foreign.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = load_tokenizer(str(folder)), load_tokenizer(str(tmp_path))
    assert ids(theirs, PLAIN) == ids(ours, PLAIN)
    assert theirs.fingerprint == ours.fingerprint


def test_special_tokens_that_a_tokenizer_json_would_add_are_not_added(folder, tmp_path):
    foreign = Tokenizer.from_file(str(folder / "tokenizer.json"))
    foreign.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 399)]
    )
    foreign.save(str(tmp_path / "tokenizer.json"))
    assert foreign.encode("a").ids[0] == 399
    assert ids(load_tokenizer(str(tmp_path)), PLAIN) == ids(load_tokenizer(str(folder)), PLAIN)


def test_the_fingerprint_tells_tokenizers_apart(folder, tmp_path):
    save(train(make_texts(seed=9), vocab_size=400, control_codes=CODES), tmp_path / "other")
    first, second = load_tokenizer(str(folder)), load_tokenizer(str(tmp_path / "other"))
    assert len(first.fingerprint) == 64 and first.fingerprint != second.fingerprint
    assert first.fingerprint == load_tokenizer(str(folder)).fingerprint


def test_saving_never_replaces_another_tokenizer_unasked(trained, tmp_path):
    folder = tmp_path / "t"
    assert save(trained, folder) and not save(trained, folder)
    (folder / "merges.txt").unlink()
    assert save(trained, folder)  # completed
    (folder / "special_tokens_map.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = train(make_texts(seed=9), vocab_size=300)
    for another in (other, trained):  # a foreign file is enough
        with pytest.raises(UserError, match="holds another tokenizer"):
            save(another, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "notes.txt").write_text("mine")
    assert save(other, folder, overwrite=True)
    assert load_tokenizer(str(folder)).vocab_size == 300
    assert sorted(path.name for path in folder.iterdir()) == [
        "merges.txt", "notes.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"
    ]  # fmt: skip


def test_no_file_gets_its_name_when_the_disk_is_full(trained, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def full_disk(path, raw):
        if "merges" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, raw)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(trained, tmp_path / "t")
    assert list((tmp_path / "t").iterdir()) == []


# --- names ---------------------------------------------------------------------------------------


def test_packaged_names_work_from_any_folder(trained, tmp_path, monkeypatch):
    package = tmp_path / "algpt2"
    save(trained, package / "algpt2-tokenizer")
    (package / "gpt2").mkdir()  # a config, no tokenizer
    monkeypatch.setattr(tokenization, "PACKAGE_FOLDER", package)
    monkeypatch.chdir("/")
    for name in ("algpt2-tokenizer", "algpt2/algpt2-tokenizer", "algpt2/algpt2-tokenizer/"):
        assert load_tokenizer(name).folder.samefile(package / "algpt2-tokenizer")


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere/here/there", "no such folder with a tokenizer$"),
        ("/nowhere", "no such folder with a tokenizer$"),
        ("empty", "empty holds no tokenizer: expected a folder with tokenizer.json"),
        ("file.json", "file.json holds no tokenizer"),
        ("half", "half holds no tokenizer"),
        ("damaged", "damaged: the tokenizer's files are damaged"),
        ("old", "old: the tokenizer's files are damaged"),
        ("someone/model", "someone/model: no such folder with a tokenizer, and not from the hub: "),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "half", "damaged", "old"):
        Path(folder).mkdir()
    Path("file.json").write_text("{}")
    Path("half/vocab.json").write_text("{}")
    Path("damaged/tokenizer.json").write_text('{"version": "1.0", ')
    Path("old/vocab.json").write_text('{"a": 0}')
    Path("old/merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)


def test_the_shipped_tokenizer_fits_the_configs():
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer("algpt2-tokenizer")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50257, 50256)
    auto = AutoTokenizer.from_pretrained(tokenizer.folder)
    assert (auto.eos_token_id, auto.model_max_length) == (50256, 1024)
    assert auto(PLAIN)["input_ids"] == ids(tokenizer, PLAIN)
    for path in tokenizer.folder.iterdir():
        assert str(ROOT) not in path.read_text(encoding="utf-8"), path.name


def test_every_file_of_an_old_folder_is_read_as_auto_tokenizer_reads_it(old_folder):
    from transformers import AutoTokenizer

    folder = old_folder
    n = len(json.loads((folder / "vocab.json").read_text()))
    codes = {"<|b|>": n, "<|a|>": n + 1, "<|user|>": n + 2}
    decoder = {str(n + 3): {"content": "<|user|>", "special": False}}
    files = {
        "added_tokens.json": {"<|b|>": n, "<|a|>": n + 1, "<|user|>": n + 3},
        "special_tokens_map.json": {"additional_special_tokens": ["<|a|>", "<|b|>"]},
        "config.json": {"model_type": "gpt2"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    auto = AutoTokenizer.from_pretrained(str(folder))
    for _ in range(2):
        ours = load_tokenizer(str(folder))
        assert {c: ours.token_to_id(c) for c in codes} == codes
        assert auto.convert_tokens_to_ids(list(codes)) == list(codes.values())  # without a hole
        assert ours.vocab_size == n + 3 and ours.with_control_codes([*codes]).n_new_codes == 0
        assert not {*codes.values()} & {*ours.encode_batch(["a <|a|><|user|> b"])[0].tolist()}
        (folder / "added_tokens.json").write_text(json.dumps({"<|b|>": n, "<|a|>": n + 1}))
        config = json.dumps({"added_tokens_decoder": decoder, "tokenizer_class": "GPT2Tokenizer"})
        (folder / "tokenizer_config.json").write_text(config)
    (folder / "added_tokens.json").write_text(json.dumps({"<|b|>": 10**12}))
    with pytest.raises(UserError, match="id 1000000000000"):
        load_tokenizer(str(folder))


def test_text_is_data_whatever_tokens_were_added_to_a_tokenizer(folder, tmp_path):
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.add_tokens(["<|user|>", "   "])
    saved.model.dropout = 0.5
    saved.save(str(tmp_path / "tokenizer.json"))
    tokenizer, plain = load_tokenizer(str(tmp_path)), load_tokenizer(str(folder))
    user, blanks = tokenizer.token_to_id("<|user|>"), tokenizer.token_to_id("   ")
    assert user in tokenizer.special_ids and blanks not in tokenizer.special_ids
    assert tokenizer.with_control_codes(["<|user|>"]).n_new_codes == 0
    for text in ("a <|user|> b", "abc" * 40):
        assert [*tokenizer.encode_batch([text])[0]] == [*plain.encode_batch([text])[0]]
    assert blanks in tokenizer.encode_batch(["a   b"])[0]  # GPT-NeoX has such entries


def test_long_words_are_counted_in_pieces_and_ordinary_words_whole(monkeypatch):
    texts = [*make_texts(), "acgt" * 5000]
    whole = train(texts, vocab_size=400).to_str()
    monkeypatch.setattr(tokenization, "WORD_BYTES", 100_000)
    assert train(make_texts(), vocab_size=400).to_str() != whole  # the long word teaches something
    plain = train(make_texts(), vocab_size=400).to_str()
    monkeypatch.setattr(tokenization, "WORD_BYTES", 10)  # no word of these texts is longer
    assert train(make_texts(), vocab_size=400).to_str() == plain
    monkeypatch.setattr(tokenization, "WORD_BYTES", 3)
    vocab = train(texts, vocab_size=400).get_vocab()
    assert max(len(word) for word in vocab if word != END_OF_TEXT) == 3

"""The tokenizer: GPT-2's byte-level BPE, trained, saved, loaded and applied in one place.

Any text encodes and decodes without loss. `<|endoftext|>` has the last id; other control codes have
the ids just before it. Text is data: the tokenizer encodes a control code that occurs in a text as
ordinary characters. Only the packer and the sampler put `eot_id` between documents.
"""

import functools
import hashlib
import json
import os
import re
import reprlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .errors import UserError, describe

END_OF_TEXT = "<|endoftext|>"
MODEL_MAX_LENGTH = 1024  # tokens; transformers warns about longer texts
MIN_FREQUENCY = 2  # a pair that occurs once is chance
WORD_BYTES = 1024  # a longer word is counted in pieces: each merge in it would walk all of it
N_BYTES = 256
SPARE_IDS = 2**16  # ids that a vocabulary may leave out
PACKAGE_FOLDER = Path(__file__).parent
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


class NoTokenizerError(UserError):
    """A folder or a model of the hub has no tokenizer that we read."""


class TextTokenizer:
    """A trained tokenizer as the rest of the project uses it: text to arrays of ids and back.

    Attributes:
        vocab_size: the largest id + 1, added tokens included.
        eot_id, bos_id, pad_id: ids of end-of-text, and of bos and padding (None: it has none).
        dtype: the smallest unsigned type that holds all ids.
        end_of_text: the entry of `eot_id`.
        fingerprint: sha256 of the canonical tokenizer.json.
        special_ids: ids of all control codes.
        n_new_codes: number of control codes added since the tokenizer was saved.
    """

    def __init__(
        self, tokenizer: Tokenizer, folder: Path, end_of_text: str, bos: str | None = None,
        pad: str | None = None,
    ) -> None:  # fmt: skip
        # A downloaded tokenizer.json may truncate and pad its texts; a corpus needs neither.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as text
        self._tokenizer = tokenizer
        self.folder = folder
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_text, self._roles = end_of_text, (end_of_text, bos, pad)
        self.eot_id: int = tokenizer.token_to_id(end_of_text)
        self.bos_id, self.pad_id = (token and tokenizer.token_to_id(token) for token in (bos, pad))
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        self._json = tokenizer.to_str()
        self.fingerprint = hashlib.sha256(self._json.encode()).hexdigest()
        added = tokenizer.get_added_tokens_decoder().items()
        self.special_ids = sorted({self.eot_id} | {i for i, token in added if token.special})
        self.n_new_codes = 0

    def with_control_codes(self, codes: Sequence[str]) -> "TextTokenizer":
        """A tokenizer that also has `codes`; a code that is new gets the next id.

        Raises:
            UserError: a code is an ordinary entry of the vocabulary.
        """
        ids = {code: self.token_to_id(code) for code in codes}
        if words := [c for c, i in ids.items() if i is not None and i not in self.special_ids]:
            raise UserError(
                f"control code {words[0]!r} is an ordinary word of the vocabulary; mark it: <|…|>"
            )
        new_codes = [code for code, i in ids.items() if i is None]
        if not new_codes:
            return self
        tokenizer = Tokenizer.from_str(self._json)
        tokenizer.add_special_tokens([AddedToken(code, normalized=False) for code in new_codes])
        result = TextTokenizer(tokenizer, self.folder, *self._roles)
        result.n_new_codes = len(new_codes)
        return result

    @property
    def start_id(self) -> int:
        """What stands before a text: bos where there is one, else end-of-text."""
        return self.eot_id if self.bos_id is None else self.bos_id

    @property
    def token_ids(self) -> dict[str, int | None]:
        """What a model's configuration repeats of the tokenizer; see `set_token_ids`."""
        ids = {"bos": self.start_id, "eos": self.eot_id, "pad": self.pad_id}
        return {f"{role}_token_id": i for role, i in ids.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder's name only, so that a worker process loads it once for all tasks."""
        return _load_same, (str(self.folder), self.fingerprint)

    def to_json(self) -> str:
        """The canonical tokenizer.json."""
        return self._json

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids (n_tokens,) per text, without added special tokens."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control codes included; a cut character becomes U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        """Id of an entry or control code; None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into `folder`, and add what `AutoTokenizer` needs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        codes = [self.decode([i]) for i in self.special_ids]
        config = _config("PreTrainedTokenizerFast", *self._roles, codes=codes)
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
        (folder / "tokenizer.json").write_text(self._json, encoding="utf-8")
        for name in () if self.n_new_codes else TOKENIZER_FILES:
            if (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)


# --- training ------------------------------------------------------------------------------------


def train(
    documents: Iterable[str],
    *,
    vocab_size: int,
    control_codes: Sequence[str] = (END_OF_TEXT,),
) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries; equal documents give equal tokenizers.

    The time is linear in the text: words are cut to `WORD_BYTES` before they are counted.

    Args:
        control_codes: `<|endoftext|>` joins them if it is not among them.
    Raises:
        UserError: the text yields fewer entries, or a control code is a word of the text.
    """
    codes = [code for code in dict.fromkeys(control_codes) if code != END_OF_TEXT] + [END_OF_TEXT]
    n_learnt = vocab_size - len(codes)
    if n_learnt < N_BYTES:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: expected at least {N_BYTES + len(codes)}"
            f" for {N_BYTES} bytes and {len(codes)} control code(s)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.FixedLength(length=WORD_BYTES),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=n_learnt,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    if len(model["vocab"]) < n_learnt:
        raise UserError(
            f"the text is too small for a vocabulary of {vocab_size:,}: it yields"
            f" {len(model['vocab']) + len(codes):,} entries; give more text or a smaller vocabulary"
        )
    if taken := [code for code in codes if code in model["vocab"]]:
        raise UserError(
            f"control code {taken[0]!r} is an ordinary word of the text; mark it: <|…|>"
        )
    vocab = model["vocab"] | {code: n_learnt + i for i, code in enumerate(codes)}
    return _byte_level(vocab, [tuple(merge) for merge in model["merges"]], codes)


def _byte_level(
    vocab: dict[str, int], merges: list[tuple[str, str]], codes: Sequence[str]
) -> Tokenizer:
    """GPT-2's pipeline around a vocabulary that contains the control codes."""
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(code, normalized=False) for code in codes])
    return tokenizer


# --- saving --------------------------------------------------------------------------------------


def save(tokenizer: Tokenizer, folder: str | Path, *, overwrite: bool = False) -> bool:
    """Write a trained tokenizer; return False if the folder already holds the same.

    The files get their names only after all of them are written.

    Raises:
        UserError: the folder holds another tokenizer, unless `overwrite`.
    """
    folder = Path(folder)
    files = {name: text.encode() for name, text in _file_texts(tokenizer).items()}
    old_files = {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).exists()}
    if old_files == files:
        return False
    if not overwrite and any(files.get(name) != raw for name, raw in old_files.items()):
        raise UserError(f"{folder} holds another tokenizer: choose another folder or --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.{os.getpid()}" for name in files}
    try:
        for name, raw in files.items():
            partial[name].write_bytes(raw)
        for name in files:
            partial[name].replace(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    for name in set(old_files) - set(files):
        (folder / name).unlink()  # a file of the old tokenizer only
    return True


def _file_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """File name -> content; tokenizer.json is last, because readers look for it first."""
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    codes = [token["content"] for token in content["added_tokens"]]
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False, separators=(",", ":")) + "\n",
        "merges.txt": "#version: 0.2\n" + merges,
        "tokenizer_config.json": _config("GPT2Tokenizer", END_OF_TEXT, codes=codes),
        "tokenizer.json": tokenizer.to_str(),
    }


def _config(
    tokenizer_class: str, end_of_text: str, bos: str | None = None, pad: str | None = None,
    codes: Sequence[str] = (),
) -> str:  # fmt: skip
    """tokenizer_config.json as transformers reads it."""
    config = {
        "add_prefix_space": False,
        "bos_token": bos or end_of_text,
        "clean_up_tokenization_spaces": False,
        "eos_token": end_of_text,
        "model_max_length": MODEL_MAX_LENGTH,
        "tokenizer_class": tokenizer_class,
        "unk_token": end_of_text,
    }
    if pad is not None:
        config["pad_token"] = pad
    # transformers 4 fails on a list here, even an empty one.
    if extra := [code for code in codes if code not in (end_of_text, bos, pad)]:
        config["extra_special_tokens"] = extra
    return json.dumps(config, indent=2) + "\n"


# --- loading -------------------------------------------------------------------------------------


def load_tokenizer(name_or_folder: str) -> TextTokenizer:
    """A tokenizer from a folder, from this package (`algpt2-tokenizer`) or from the hub (`gpt2`).

    Raises:
        NoTokenizerError: there is no tokenizer.json, nor vocab.json and merges.txt.
        UserError: they are damaged.
    """
    path = Path(name_or_folder).expanduser()
    for folder in (path, PACKAGE_FOLDER / path, PACKAGE_FOLDER.parent / path):
        if _holds_tokenizer(folder):
            return _load_folder(folder)
    if path.exists():
        raise NoTokenizerError(
            f"{name_or_folder} holds no tokenizer: expected a folder with tokenizer.json,"
            " or vocab.json and merges.txt"
        )
    return _load_folder(_download(name_or_folder))


def _holds_tokenizer(folder: Path) -> bool:
    """True if a tokenizer can be loaded from `folder`."""
    files = {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    return "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files


def _load_folder(folder: Path) -> TextTokenizer:
    try:
        _check_ids(folder)
        if (folder / "tokenizer.json").is_file():
            tokenizer = _load_json(folder / "tokenizer.json")
        else:
            tokenizer = _load_vocab_and_merges(folder)
        end_of_text = _end_of_text(tokenizer, folder)
        bos, pad = (_named_token(folder, role) for role in ("bos_token", "pad_token"))
    except UserError:
        raise
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust raises a bare Exception, or a panic outside Exception
        reason = f"the tokenizer's files are damaged ({describe(error)[:300]})"
        raise UserError(f"{folder}: {reason}") from None
    return TextTokenizer(tokenizer, folder, end_of_text, bos, pad)


def _check_ids(folder: Path) -> None:
    """Raise `ValueError` for an absurd id: the Rust side visits every id up to the largest."""
    path = folder / "tokenizer.json"
    if path.is_file():
        content = _read_json(path)
        vocab, added = content["model"]["vocab"], content.get("added_tokens") or []
        ids = [token["id"] for token in added]
        n_ids = len(vocab) + len(ids)
        ids += vocab.values() if isinstance(vocab, dict) else []
    else:
        ids = [*(_read_json(folder / "vocab.json") | _added_tokens(folder)).values()]
        n_ids = len(ids)
    if bad_ids := [i for i in ids if type(i) is not int or not 0 <= i < 2 * n_ids + SPARE_IDS]:
        raise ValueError(f"id {reprlib.repr(bad_ids[0])} in a vocabulary of {n_ids:,} entries")


@functools.lru_cache(4)
def _load_same(folder: str, fingerprint: str) -> TextTokenizer:
    tokenizer = _load_folder(Path(folder))
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"{folder}: the tokenizer changed while it was in use")
    return tokenizer


def _load_vocab_and_merges(folder: Path) -> Tokenizer:
    """The tokenizer in GPT-2's two files, with the tokens that were added to them later."""
    vocab, added = _read_json(folder / "vocab.json"), _added_tokens(folder)
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    # Only the first line can be the version; a later line that begins with "#" is a merge.
    lines = lines[1:] if lines[0].startswith("#version") else lines
    merges = [tuple(line.split(" ")) for line in lines if line]
    codes = [END_OF_TEXT] if END_OF_TEXT in vocab else []
    return _byte_level(vocab, merges, [*codes, *sorted(added, key=added.get)])


def _added_tokens(folder: Path) -> dict[str, int]:
    """The tokens that an old folder has beside vocab.json, as AutoTokenizer finds them."""
    decoder = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    added = {token["content"]: int(i) for i, token in decoder.items()}
    return _read_json(folder / "added_tokens.json") | added


def _load_json(path: Path) -> Tokenizer:
    """A tokenizer.json whose added tokens are control codes: text is data, marked special or not.

    Runs of blanks stay entries of the vocabulary, as GPT-NeoX has them. BPE's dropout is off: it
    would give another encoding each time.
    """
    content = _read_json(path)
    words = [t for t in content.get("added_tokens") or [] if not t["content"].isspace()]
    if all(token["special"] for token in words) and not content["model"].get("dropout"):
        return Tokenizer.from_file(str(path))
    for token in words:
        token["special"] = True
    content["model"]["dropout"] = None
    return Tokenizer.from_str(json.dumps(content))


def _read_json(path: Path) -> dict[str, Any]:
    """A file of JSON; a file that is missing is empty."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _end_of_text(tokenizer: Tokenizer, folder: Path) -> str:
    """`<|endoftext|>` if the vocabulary has it, else the folder's eos_token."""
    token = END_OF_TEXT
    if tokenizer.token_to_id(token) is None:
        token = _named_token(folder, "eos_token")
    if token is None or tokenizer.token_to_id(token) is None:
        raise UserError(f"{folder}: the vocabulary has no {END_OF_TEXT} and no eos_token")
    return token


def _named_token(folder: Path, role: str) -> str | None:
    """The token of a role, such as "bos_token", in the folder's files; None: it has none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(folder / name).get(role)
        token = token["content"] if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise ValueError(f"{role} in {name} is no text")
        if token is not None:
            return token
    return None


def set_token_ids(ids: dict[str, int | None], *configs: Any) -> None:
    """Write bos, eos and pad into configurations of transformers (None is skipped), so that no text
    is generated past its end. Several ends stay if the tokenizer's is among them."""
    for config in filter(None, configs):
        for key, value in ids.items():
            before = getattr(config, key, None)
            if not (isinstance(before, list) and value in before):
                setattr(config, key, value)


def _download(name: str) -> Path:
    """The folder in the hub's cache that holds the tokenizer files of model `name`."""
    missing = f"{name}: no such folder with a tokenizer"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(missing)
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=TOKENIZER_FILES))
    except Exception as error:  # the hub's client and its HTTP library raise many types
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{missing}, and not from the hub: {reason}") from None
    if not _holds_tokenizer(folder):
        raise NoTokenizerError(
            f"{name}: the hub's model has no tokenizer.json, nor vocab.json and merges.txt"
        )
    return folder

"""What the tests share: no network, no cache of the user's, a small corpus and its tokenizer."""

import os
import random

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TF_CPP_MIN_LOG_LEVEL": "3"}

import fsspec
import pytest
from helpers import as_flags

WORDS = "the a one model token layer block shared learns reads writes of and in text small".split()


def make_text(seed: int, n_words: int) -> str:
    """Words drawn with a seed, a line end after every tenth."""
    draw = random.Random(seed)
    words = [draw.choice(WORDS) for _ in range(n_words)]
    return "\n".join(" ".join(words[i : i + 10]) for i in range(0, n_words, 10))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder that lives as long as the test."""
    monkeypatch.setenv("ALGPT2_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


@pytest.fixture
def memory():
    """The store behind memory://, empty before and after."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with train/ and valid/ of small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, seeds in (("train", range(20)), ("valid", range(100, 104))):
        (folder / split).mkdir()
        for seed in seeds:
            (folder / split / f"{seed:03}.txt").write_text(make_text(seed, 150))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus, tmp_path_factory):
    """A byte-level BPE tokenizer of 300 entries trained on the corpus."""
    from algpt2 import tokenization_algpt2
    from algpt2.corpus.documents import documents

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    texts = documents(str(corpus / "train"))
    tokenization_algpt2.save(tokenization_algpt2.train(texts, vocab_size=300), folder)
    return folder


@pytest.fixture(scope="session")
def config_folder(tokenizer_folder, tmp_path_factory):
    """A config for that tokenizer: one shared block, two layers, factorized embedding."""
    from algpt2 import ALGPT2Config

    folder = tmp_path_factory.mktemp("config") / "tiny"
    ALGPT2Config(
        vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2, embedding_size=16,
        bos_token_id=299, eos_token_id=299, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1,
        architectures=["ALGPT2LMHeadModel"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def flags(corpus, tokenizer_folder, config_folder, tmp_path):
    """Make the command line of a run of six steps: evaluation and checkpoint at steps 3 and 6."""

    def make(save_dir="run", **changes):
        options = {
            "config": config_folder, "tokenizer": tokenizer_folder, "save_dir": tmp_path / save_dir,
            "train_path": corpus / "train", "val_path": corpus / "valid", "seq_len": 16,
            "max_steps": 6, "eval_steps": 3, "logging_steps": 1, "lr": 1e-2, "device": "cpu",
        } | changes  # fmt: skip
        return as_flags(options)

    return make


@pytest.fixture(scope="session")
def foreign_tokenizer(tmp_path_factory):
    """Another project's byte-level tokenizer: eos, bos and pad differ, and are its first ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("foreign") / "tokenizer"
    codes = ["</s>", "<s>", "<pad>"]
    entries = [*codes, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(code, normalized=False) for code in codes])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def foreign_model(foreign_tokenizer, tmp_path):
    """A stock GPT-2 of that tokenizer, whose config.json names another end of text."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=259, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
        bos_token_id=258, eos_token_id=258, pad_token_id=9,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "foreign_model")
    AutoTokenizer.from_pretrained(foreign_tokenizer).save_pretrained(tmp_path / "foreign_model")
    return tmp_path / "foreign_model"

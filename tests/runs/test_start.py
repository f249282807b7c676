"""What a run starts from is found once: no checkpoint is read twice to verify it."""

from collections import Counter

import pytest
from helpers import as_flags

import train_pt
import train_tf
from algpt2.errors import UserError
from algpt2.options import DataOptions, PackOptions
from algpt2.runs import checkpoints
from algpt2.runs.start import TEXT_ONLY, open_or_pack
from algpt2.shards.packing import pack
from algpt2.system import files
from algpt2.tokenization_algpt2 import load_tokenizer

SCRIPTS = {"pt": train_pt, "tf": train_tf}


@pytest.fixture
def hashed(monkeypatch):
    """How often each weight file was hashed since the last call."""
    counts, whole = Counter(), files.file_sha256

    def counting(path):
        if path.name == "model.safetensors":
            counts[str(path)] += 1
        return whole(path)

    def since_last():
        found = dict(counts)
        counts.clear()
        return found

    for module in (files, checkpoints):
        monkeypatch.setattr(module, "file_sha256", counting)
    return since_last


@pytest.mark.parametrize("framework", SCRIPTS)
def test_each_checkpoint_is_verified_once(
    framework, hashed, corpus, tokenizer_folder, config_folder, tmp_path
):
    main = SCRIPTS[framework].main
    paths = {"train_path": corpus / "train", "val_path": corpus / "valid", "device": "cpu"}
    train = paths | {"seq_len": 16, "max_steps": 2, "eval_steps": 1, "n_eval_rows": 4}
    config = train | {"config": config_folder, "tokenizer": tokenizer_folder}
    start, weights = tmp_path / "start", "model.safetensors"
    stopped = as_flags(config | {"save_dir": start, "max_minutes": 1e-9})
    written = [str(start / f".checkpoint-0000000{step}.partial/{weights}") for step in (1, 2)]

    main(stopped)
    assert hashed() == {written[0]: 1}
    main(stopped)  # step 1 is evaluated; its weights stay, only the marker is new
    first, last = (str(start / f"checkpoint-0000000{step}/{weights}") for step in (1, 2))
    assert hashed() == {first: 1}
    main(as_flags(config | {"save_dir": start}))
    assert hashed() == {first: 1, written[1]: 1}

    main(["--eval_only", *as_flags(paths | {"checkpoint": start, "seq_len": 16})])
    assert hashed() == {last: 1}
    main(["--sample_only", *as_flags({"checkpoint": start, "max_length": 4, "device": "cpu"})])
    assert hashed() == {last: 1}

    finetuned = {"--checkpoint": train | {"checkpoint": start}}
    if framework == "pt":
        finetuned["--init_from"] = train | {"config": config_folder, "init_from": start}
    for name, options in finetuned.items():
        main(as_flags(options | {"save_dir": tmp_path / name, "eval_steps": 2}))
        new = str(tmp_path / name / f".checkpoint-00000002.partial/{weights}")
        assert hashed() == {last: 1, new: 1}


@pytest.fixture
def packed(corpus, tokenizer_folder, tmp_path):
    """A tokenizer, and two folders of shards that were packed with it."""
    tokenizer, folders = load_tokenizer(str(tokenizer_folder)), []
    for split in ("train", "valid"):
        folders.append(str(tmp_path / split))
        pack(PackOptions((str(corpus / split),), folders[-1], seq_len=16), tokenizer)
    return tokenizer, folders


def test_an_option_for_text_is_refused_for_shards_that_were_packed_without_it(packed):
    tokenizer, folders = packed
    values = {
        "use_control_codes": False, "control_codes": ("<|title|>",), "line_by_line": True,
        "document_mark": "<|endoftext|>", "text_key": "body", "detokenizer": "ptb",
    }  # fmt: skip
    assert values.keys() == {*TEXT_ONLY}
    for name, value in values.items():
        with pytest.raises(UserError, match=f"was packed with.* --{name}.*drop the flag"):
            open_or_pack(folders[:1], DataOptions(**{name: value}), tokenizer, 16)
    same = DataOptions(control_codes=("<|endoftext|>",))
    assert len(open_or_pack(folders[:1], same, tokenizer, 16))
    with pytest.raises(UserError, match="was packed with --control_codes"):
        codes = DataOptions(control_codes=("<|a|>", "<|b|>"))
        open_or_pack(folders, codes, tokenizer, 16)


def test_several_packed_folders_are_read_as_one(packed, corpus):
    tokenizer, folders = packed
    rows = open_or_pack(folders, DataOptions(), tokenizer, 16)
    parts = [open_or_pack([folder], DataOptions(), tokenizer, 16) for folder in folders]
    assert len(rows) == sum(map(len, parts))
    assert (rows[len(parts[0])] == parts[1][0]).all()
    with pytest.raises(UserError, match="expected texts or packed shards, got both"):
        open_or_pack([folders[0], str(corpus / "valid")], DataOptions(), tokenizer, 16)

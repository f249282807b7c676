"""What a run starts from is found once: no checkpoint is read twice to verify it."""

from collections import Counter

import pytest
from helpers import as_flags

import train_pt
import train_tf
from algpt2.runs import checkpoints
from algpt2.system import files

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

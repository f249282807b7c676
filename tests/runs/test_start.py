"""What a run starts from is found once, whole, and never replaced by a default."""

import importlib
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import as_flags
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import export_gpt2
import train_pt
import train_tf
from algpt2 import ALGPT2Config
from algpt2.errors import UserError
from algpt2.options import DataOptions, ModelOptions, PackOptions, TrainOptions
from algpt2.runs import checkpoints
from algpt2.runs.start import TEXT_ONLY, Start, find_start, open_or_pack
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


# --- the tokenizer of somebody else's weights ----------------------------------------------------

SHAPE = {
    "vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2,
    "bos_token_id": 299, "eos_token_id": 299,
}  # fmt: skip


@pytest.fixture
def foreign(tmp_path):
    """A stock GPT-2 without tokenizer files."""
    folder = tmp_path / "foreign"
    GPT2LMHeadModel(GPT2Config(**SHAPE)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("framework", SCRIPTS)
@pytest.mark.parametrize("mode", ["train", "eval_only", "sample_only"])
def test_no_default_replaces_the_tokenizer_of_weights(framework, mode, foreign, corpus, tmp_path):
    options = {
        "train_path": corpus / "train", "val_path": corpus / "valid", "device": "cpu",
        "save_dir": tmp_path / "run", "seq_len": 16, "checkpoint": foreign,
    }  # fmt: skip
    flag = [f"--{mode}"] if mode.endswith("only") else []
    with pytest.raises(UserError, match=r"foreign holds no tokenizer.*--tokenizer names"):
        SCRIPTS[framework].main([*flag, *as_flags(options)])
    assert not (tmp_path / "run").exists()


def test_init_from_weights_without_a_tokenizer_asks_for_it(foreign, flags):
    with pytest.raises(UserError, match=r"foreign holds no tokenizer.*--tokenizer names"):
        train_pt.main(flags("run", init_from=foreign, tokenizer=None))


def test_weights_without_a_tokenizer_are_evaluated_with_the_one_that_is_named(
    foreign, corpus, tokenizer_folder, capsys
):
    paths = {"val_path": corpus / "valid", "device": "cpu", "seq_len": 16}
    train_pt.main(
        ["--eval_only", *as_flags(paths | {"checkpoint": foreign, "tokenizer": tokenizer_folder})]
    )
    assert "nats/token" in capsys.readouterr().out


# --- the ids of bos, eos and pad -----------------------------------------------------------------


def build_model(framework, start):
    return importlib.import_module(f"algpt2.training.trainer_{framework}").build_model(start)


def token_ids(folder):
    """bos, eos and pad of config.json and of generation_config.json."""
    files = [json.loads((folder / f"{f}config.json").read_text()) for f in ("", "generation_")]
    return [[file.get(f"{role}_token_id") for role in ("bos", "eos", "pad")] for file in files]


@pytest.mark.parametrize(
    ("framework", "way"),
    [(f, way) for f in SCRIPTS for way in ("config", "checkpoint", "new code")]
    + [("pt", "init_from")],
)
def test_a_model_has_the_ids_of_its_tokenizer(
    framework, way, foreign_model, foreign_tokenizer, tmp_path
):
    model = {"config": str(foreign_model)}
    if way in ("checkpoint", "new code"):
        model = {"checkpoint": str(foreign_model)}
    elif way == "init_from":
        ALGPT2Config.from_pretrained(foreign_model).save_pretrained(tmp_path / "own")
        model = {"config": str(tmp_path / "own"), "init_from": str(foreign_model)}
    data = DataOptions(control_codes=("<|new|>",) if way == "new code" else None)
    start = find_start(TrainOptions(data=data, model=ModelOptions(**model)))
    folder = tmp_path / "saved"
    build_model(framework, start).save_pretrained(folder)
    start.tokenizer.save(folder)
    assert token_ids(folder) == [[1, 0, 2]] * 2
    theirs = AutoTokenizer.from_pretrained(folder)
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id] == [1, 0, 2]


def test_a_model_of_packed_rows_alone_has_their_end_of_text(foreign_model):
    start = replace(Start.find(ModelOptions(config=str(foreign_model))), eot_id=0)
    config = build_model("tf", start).config
    assert (config.bos_token_id, config.eos_token_id) == (0, 0)


# --- weights and their config.json ---------------------------------------------------------------


@pytest.fixture
def change(foreign_model):
    """Change the weights and the config.json of the foreign model."""

    def make(weights=lambda state: state, **keys):
        path, config = foreign_model / "model.safetensors", foreign_model / "config.json"
        save_file(weights(load_file(path)), path, metadata={"format": "pt"})
        config.write_text(json.dumps(json.loads(config.read_text()) | keys))
        return Start.find(ModelOptions(checkpoint=str(foreign_model)))

    return make


@pytest.mark.parametrize("framework", SCRIPTS)
def test_fewer_layers_than_the_file_are_an_error(framework, change, foreign_model, tmp_path):
    start = replace(change(n_layer=1), tokenizer=load_tokenizer(str(foreign_model)))
    with pytest.raises(UserError, match=r"h\.1\..*config\.json"):
        build_model(framework, start)
    with pytest.raises(UserError, match=r"h\.1\..*config\.json"):
        export_gpt2.main([str(foreign_model), str(tmp_path / "out")])


@pytest.mark.parametrize("framework", SCRIPTS)
def test_a_head_beside_a_tied_table_is_left_out_with_a_warning(
    framework, change, foreign_model, tmp_path, capsys
):
    head = torch.ones(259, 16)
    start = change(lambda state: state | {"lm_head.weight": head})
    start = replace(start, tokenizer=load_tokenizer(str(foreign_model)))
    model = build_model(framework, start)
    assert "though its config.json ties them" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert "lm_head.weight" not in saved
    export_gpt2.main([str(foreign_model), str(tmp_path / "out")])
    assert "though its config.json ties them" in capsys.readouterr().out
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(torch.tensor([[1, 5]])).logits
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([[1, 5]])).logits
    torch.testing.assert_close(logits, exported)


@pytest.mark.parametrize("framework", SCRIPTS)
def test_a_copy_of_the_table_as_head_is_no_warning(framework, change, foreign_model, capsys):
    start = change(lambda state: state | {"lm_head.weight": state["transformer.wte.weight"] + 0})
    build_model(framework, replace(start, tokenizer=load_tokenizer(str(foreign_model))))
    assert "warning" not in capsys.readouterr().out


# --- shards ---


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

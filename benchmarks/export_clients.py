"""Greedy text of a checkpoint from other tools, through export_gpt2.py: is it the same?

    python3 benchmarks/export_clients.py --checkpoint runs/quickstart/model
    python3 benchmarks/export_clients.py --checkpoint runs/train --llama_cpp llama.cpp

A tool that is not installed is said so. Markdown/EXPORT.md has what to install and each tool's own
commands; this script does the same through their Python interfaces.
"""

import contextlib
import io
import json
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from algpt2.errors import UserError, describe
from algpt2.system.console import table
from algpt2.system.script import run_script

Ids = list[int]


@dataclass(frozen=True)
class Options:
    """What is compared."""

    checkpoint: str  # folder of a run or of a checkpoint
    prompts: tuple[str, ...] = ("Returns the", "The model", "import")  # texts to continue
    n_tokens: int = 60  # greedy tokens after each prompt
    llama_cpp: str | None = None  # folder of llama.cpp's source: convert_hf_to_gguf.py, gguf-py


def main(argv: Sequence[str] | None = None) -> int:
    """Export, generate with every tool, print the table; 1 if a tool's text differs."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    from algpt2.export.convert_pt import export_gpt2

    clients: dict[str, Callable[[Path, list[Ids], Options], list[str]]] = {
        "transformers GPT2LMHeadModel": with_transformers,
        "ONNX Runtime": with_onnxruntime,
        "CTranslate2": with_ctranslate2,
        "llama.cpp": with_llama_cpp,
    }
    lines, differs = [["", "same text", "of characters"]], False
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "gpt2"
        export_gpt2(options.checkpoint, folder)
        prompts, expected = generate_here(options)
        for name, client in clients.items():
            try:
                texts = client(folder, prompts, options)
            except (ImportError, UserError) as error:
                lines.append([name, f"not run: {describe(error)}", ""])
                continue
            same = sum(text == other for text, other in zip(texts, expected, strict=True))
            differs |= same < len(texts)
            lines.append([name, f"{same} of {len(texts)}", f"{sum(map(len, expected))}"])
    print(json.dumps(dict(zip(options.prompts, expected, strict=True)), indent=1))
    print(table(lines))
    return int(differs)


def generate_here(options: Options) -> tuple[list[Ids], list[str]]:
    """Prompts as ids and their greedy continuations by ALGPT2 itself."""
    from algpt2.options import ModelOptions, TrainOptions
    from algpt2.runs.start import find_start
    from algpt2.training.trainer_pt import build_model

    model = ModelOptions(checkpoint=options.checkpoint)
    start = find_start(TrainOptions(model=model, sample_only=True))
    tokenizer, model = start.tokenizer, build_model(start).eval()
    prompts = [[tokenizer.eot_id, *x.tolist()] for x in tokenizer.encode_batch(options.prompts)]
    return prompts, [tokenizer.decode(greedy(model, ids, options.n_tokens)) for ids in prompts]


def greedy(model: object, prompt: Ids, n_tokens: int) -> Ids:
    """Greedy continuation by transformers' `generate`, end-of-text no reason to stop."""
    import torch

    ids = torch.tensor([prompt])
    flags = {"max_new_tokens": n_tokens, "do_sample": False, "eos_token_id": None}
    ids = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **flags)
    return ids[0, len(prompt) :].tolist()


def decode(folder: Path, ids: Ids) -> str:
    """Text of ids by the exported tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).decode(ids, clean_up_tokenization_spaces=False)


def with_transformers(folder: Path, prompts: list[Ids], options: Options) -> list[str]:
    """The stock class on the exported folder."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    return [decode(folder, greedy(model, ids, options.n_tokens)) for ids in prompts]


def with_onnxruntime(folder: Path, prompts: list[Ids], options: Options) -> list[str]:
    """torch.onnx on the stock class, then ONNX Runtime, the whole text anew for each token."""
    import onnxruntime
    import onnxscript  # noqa: F401  (torch.onnx needs it)
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, use_cache=False).eval()
    length = torch.export.Dim("length", min=2, max=model.config.n_positions)
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            logits_only(model), (torch.tensor([prompts[0]]),), dynamo=True,
            input_names=["input_ids"], output_names=["logits"],
            dynamic_shapes={"input_ids": {1: length}},
        )  # fmt: skip
    program.save(str(folder / "model.onnx"))
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    texts = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(options.n_tokens):
            (logits,) = session.run(None, {"input_ids": [ids]})
            ids.append(int(logits[0, -1].argmax()))
        texts.append(decode(folder, ids[len(prompt) :]))
    return texts


def with_ctranslate2(folder: Path, prompts: list[Ids], options: Options) -> list[str]:
    """CTranslate2's own converter and `Generator`, float32."""
    import ctranslate2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(folder / "ct2"))
    generator = ctranslate2.Generator(str(folder / "ct2"), compute_type="float32")
    results = generator.generate_batch(
        [tokenizer.convert_ids_to_tokens(ids) for ids in prompts], max_length=options.n_tokens,
        min_length=options.n_tokens, sampling_topk=1, include_prompt_in_result=False,
    )  # fmt: skip
    return [decode(folder, result.sequences_ids[0]) for result in results]


def with_llama_cpp(folder: Path, prompts: list[Ids], options: Options) -> list[str]:
    """llama.cpp's own converter to a float32 GGUF, and its server within this process."""
    import xllamacpp

    if not options.llama_cpp:
        raise UserError("--llama_cpp FOLDER with convert_hf_to_gguf.py is needed")
    convert_to_gguf(Path(options.llama_cpp), folder)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(folder / "model.gguf"), 0, 1
    params.verbosity = -1  # silent
    server = xllamacpp.Server(params)
    flags = {"n_predict": options.n_tokens, "top_k": 1, "temperature": 0.0, "ignore_eos": True}
    answers = [server.handle_completions({"prompt": ids, **flags}) for ids in prompts]
    return [answer["choices"][0]["text"] for answer in answers]


def convert_to_gguf(source: Path, folder: Path) -> None:
    """convert_hf_to_gguf.py, told that the tokenizer splits text as GPT-2's does: it knows
    tokenizers by a hash of their ids only, and refuses those that people train."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    script = source / "convert_hf_to_gguf.py"
    before = sys.argv
    sys.argv = [str(script), str(folder), "--outtype=f32", f"--outfile={folder / 'model.gguf'}"]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


def logits_only(model: object) -> object:
    """`model` with ids in and logits out: no cache among the inputs and outputs of the graph."""
    import torch

    class Wrapped(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids, use_cache=False).logits

    wrapped = Wrapped()
    wrapped.model = model
    return wrapped.eval()


if __name__ == "__main__":
    run_script(main)

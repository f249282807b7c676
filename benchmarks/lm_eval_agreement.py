"""This project's evaluator against lm-evaluation-harness, on one checkpoint and the same text.

    pip install lm_eval[hf]                    # not in requirements.txt: only this script uses it
    python3 benchmarks/lm_eval_agreement.py --checkpoint runs/quickstart/model --bench data/bench

Both run as their users run them: `train_pt.py --eval_only --eval_sets`, and `lm_eval --model hf`
with task files that are written here and name local data, on a copy of the checkpoint: the model's
code is in it. A number that differs in the fourth digit is printed as such, exit code 1.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro
from harness import ROOT, save

from algpt2.runs.checkpoints import find_checkpoint
from algpt2.shards.detokenizers import wikitext
from algpt2.system.console import table

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
"""
TEXT_TASK = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: !function text_task.target
process_results: !function text_task.process_results
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
TEXT_FUNCTIONS = """def target(doc):
    return doc["detokenized"]


def process_results(doc, results):
    n_words = len(doc["text"].split()) + doc["text"].count("\\n")
    n_bytes = len(doc["text"].encode())
    counts = {"word_perplexity": n_words, "byte_perplexity": n_bytes, "bits_per_byte": n_bytes}
    return {name: (results[0], count) for name, count in counts.items()}
"""
LAMBADA_TASK = """output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
BLIMP_TASK = """output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@dataclass(frozen=True)
class Options:
    """What is compared."""

    checkpoint: str  # run or checkpoint of train_pt.py
    bench: str = "data/bench"  # folder with wikitext-2-raw/, lambada/ and blimp/
    pages: int = 20  # of WikiText-2's test file
    passages: int = 500  # of LAMBADA
    pairs: int = 20  # of each paradigm of BLiMP
    tolerance: float = 1e-4  # relative difference


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, print the table; 1 if they disagree."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        left_out = shutil.ignore_patterns("optimizer*", "training_state.json", "evaluation.*")
        model = folder / "model"  # without its run, so that it keeps its evaluation itself
        shutil.copytree(find_checkpoint(Path(options.checkpoint)), model, ignore=left_out)
        paradigms = write_sets(options, folder / "sets")
        write_tasks(folder / "sets", folder / "tasks", paradigms)
        ours = run_ours(model, folder / "sets")
        theirs = run_lm_eval(model, folder, paradigms)
    save("lm_eval_agreement", {"lm_eval": version("lm_eval"), "ours": ours, "theirs": theirs})
    lines, is_equal = [["", "train_pt.py", "lm_eval", "rel. difference"]], True
    for name, value in theirs.items():
        difference = abs(ours[name] - value) / max(abs(value), 1e-9)
        is_equal &= difference <= options.tolerance
        if not name.startswith("paradigm") or difference > options.tolerance:
            lines.append([name, f"{ours[name]:.6g}", f"{value:.6g}", f"{difference:.1e}"])
    print(table(lines))
    print(f"{len(paradigms)} paradigms of BLiMP compared one by one; equal: {is_equal}")
    return 0 if is_equal else 1


def write_sets(options: Options, folder: Path) -> list[str]:
    """Pages of WikiText, passages of LAMBADA, pairs of BLiMP; the names of its paradigms."""
    bench = Path(options.bench)
    (folder / "blimp").mkdir(parents=True)
    pages: list[str] = []
    for line in (bench / "wikitext-2-raw" / "wiki.test.raw").open(encoding="utf-8"):
        starts = line.startswith(" = ") and not line.startswith(" = = ")
        if starts or not pages:
            pages.append("")
        pages[-1] += line
    pages = [page for page in pages if page.strip()][: options.pages]
    rows = [{"text": page, "detokenized": wikitext(page)} for page in pages]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "wiki.pages.jsonl").write_text(text, encoding="utf-8")
    cut(bench / "lambada" / "lambada_test.jsonl", folder / "lambada.jsonl", options.passages)
    paths = sorted((bench / "blimp").glob("*.jsonl"))
    for path in paths:
        cut(path, folder / "blimp" / path.name, options.pairs)
    return [path.stem for path in paths]


def cut(source: Path, target: Path, n_lines: int) -> None:
    """The first lines of a file."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[:n_lines]), encoding="utf-8")


def write_tasks(sets: Path, folder: Path, paradigms: Sequence[str]) -> None:
    """lm_eval's task files: the definitions of its own tasks, on local data."""
    folder.mkdir()
    (folder / "text_task.py").write_text(TEXT_FUNCTIONS)
    tasks = {"text": ("wiki.pages", TEXT_TASK), "lambada": ("lambada", LAMBADA_TASK)}
    tasks |= {name: (f"blimp/{name}", BLIMP_TASK) for name in paradigms}
    for name, (file, definition) in tasks.items():
        head = TASK.format(name=f"local_{name}", path=sets / f"{file}.jsonl")
        (folder / f"{name}.yaml").write_text(head + definition)


def run_ours(model: Path, sets: Path) -> dict[str, float]:
    """Numbers out of evaluation.json, under the names that `run_lm_eval` gives its own."""
    command = [sys.executable, str(ROOT / "train_pt.py"), "--eval_only", "--precision=fp32"]
    flags = [f"--checkpoint={model}", f"--eval_sets={sets}", "--detokenizer=auto"]
    subprocess.run([*command, *flags], check=True)
    records = json.loads((model / "evaluation.json").read_text())["evaluations"]
    sets_by_name = {record["set"].split("/")[-1]: record for record in records}
    text, lambada, blimp = (
        {measure["name"]: measure["value"] for measure in sets_by_name[name]["measures"]}
        for name in ("wiki.pages.jsonl", "lambada.jsonl", "blimp")
    )
    groups = sets_by_name["blimp"]["details"]["groups"]
    return {
        "word ppl": text["word ppl"],
        "byte ppl": 2 ** text["bits per byte"],
        "bits per byte": text["bits per byte"],
        "LAMBADA accuracy, %": lambada["accuracy, last word"],
        "LAMBADA ppl, last word": lambada["ppl, last word"],
        "BLiMP accuracy, %": blimp["accuracy"],
    } | {name: group["accuracy"] for name, group in groups.items()}


def run_lm_eval(model: Path, folder: Path, paradigms: Sequence[str]) -> dict[str, float]:
    """The same numbers from `lm_eval --model hf`."""
    names = [f"local_{name}" for name in ("text", "lambada", *paradigms)]
    flags = [
        f"--model_args=pretrained={model},trust_remote_code=True,dtype=float32",
        f"--tasks={','.join(names)}", f"--include_path={folder / 'tasks'}", "--batch_size=8",
        f"--output_path={folder / 'results'}",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-m", "lm_eval", "run", "--model=hf", *flags]
    subprocess.run(command, check=True, env=os.environ | offline)
    (path,) = (folder / "results").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    text, lambada = results["local_text"], results["local_lambada"]
    accuracies = {f"paradigm {name}": results[f"local_{name}"]["acc,none"] for name in paradigms}
    return {
        "word ppl": text["word_perplexity,none"],
        "byte ppl": text["byte_perplexity,none"],
        "bits per byte": text["bits_per_byte,none"],
        "LAMBADA accuracy, %": 100 * lambada["acc,none"],
        "LAMBADA ppl, last word": lambada["perplexity,none"],
        "BLiMP accuracy, %": 100 * sum(accuracies.values()) / len(accuracies),
        **accuracies,
    }


if __name__ == "__main__":
    sys.exit(main())

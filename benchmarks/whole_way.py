"""The whole way on real data, on CPU: raw text, corpus, a small model, tuned to answer, published, opened by others.

    python benchmarks/whole_way.py TEXT GSM8K_TRAIN GSM8K_TEST [FOLDER]

TEXT is a folder of text files; the other two are files of GSM8K, rows {"question", "answer"}. The commands are those of
docs/sft.md, run one after another in FOLDER (default: a temporary one), which goes on where it was stopped. The bars:
answers in the trained form, more right ones than the model had before it was tuned, and the same answers, token for
token, from transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "demo"
EXPORT = "runs/demo/sft/export"
IN_FORM = 0.95  # of the answers
COMPARED, NEW_TOKENS = 8, 200  # prompts that transformers answers too, and tokens of an answer
SAMPLES = {"base": 1, "sft": 4}  # answers to each test problem; the base goes on until it is cut
UNFORMED, RIGHT = ("no final answer", "cut at max_new_tokens", "empty"), ("duplicate",)  # of what the report drops


def command(folder: Path, module: str, *arguments: str) -> None:
    """Runs a command of ours in the folder, and says how long it took."""
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder, env=env, check=True)
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


def check(folder: Path, test: Path, model: str, name: str) -> tuple[float, float]:
    """Of a model's answers to the test problems, the part in the trained form, and that of right ones."""
    values = {
        "input": str(test),
        "output": f"runs/demo/{name}-right.jsonl",
        "model.path": model,
        "stage.samples": SAMPLES[name],
    }
    bound = [f"{path}={json.dumps(value)}" for path, value in values.items()]
    command(folder, "train.data.synthesis", str(CONFIGS / "check.gin"), "--set", *bound)
    report = json.loads((folder / f"runs/demo/{name}-right.jsonl.report.json").read_text())
    count, dropped = report["rows in"] * SAMPLES[name], report["dropped"]
    unformed, right = (sum(dropped.get(reason, 0) for reason in of) for of in (UNFORMED, RIGHT))
    return 1 - unformed / count, (report["rows out"] + right) / count


def same_in_transformers(folder: Path, test: Path) -> int:
    """To how many of the first test problems transformers gives the very answer that we give."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    problems = [json.loads(line)["question"] for line in test.read_text().splitlines()[:COMPARED]]
    chats = [{"messages": [{"role": "user", "content": problem}]} for problem in problems]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    how = ["--temperature", "0", "--max-new-tokens", str(NEW_TOKENS), "--output", "answers.jsonl", "--overwrite"]
    command(folder, "infer", "generate", EXPORT, "--input", "chats.jsonl", *how)
    ours = [json.loads(line)["completion"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / EXPORT)
    model = AutoModelForCausalLM.from_pretrained(folder / EXPORT, dtype=torch.float32)
    theirs = [answer(model, tokenizer, chat["messages"]) for chat in chats]
    return sum(one == other for one, other in zip(ours, theirs, strict=True))


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """What transformers answers, by the folder's own template and end."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def main(arguments: list[str]) -> int:
    """The exit code: 1 if a bar is missed."""
    if len(arguments) not in (3, 4):
        sys.exit(__doc__)
    text, train, test = (Path(path).expanduser().resolve() for path in arguments[:3])
    folder = Path(arguments[3] if len(arguments) == 4 else tempfile.mkdtemp(prefix="whole-way-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    corpus = str(CONFIGS / "corpus.gin")
    start = time.perf_counter()
    command(folder, "train.data.corpus", corpus, "--set", f"source.path={json.dumps(str(text))}")
    command(folder, "train.data.corpus", corpus, "--set", "source=@PythonStdlib", 'output="runs/demo/corpus/code"')
    command(folder, "train", str(CONFIGS / "pretrain.gin"))
    command(folder, "train", str(CONFIGS / "sft.gin"), "--set", f"data.source.path={json.dumps(str(train))}")
    (base_form, base_right), (form, right) = (
        check(folder, test, "runs/demo/base", "base"),
        check(folder, test, EXPORT, "sft"),
    )
    same = same_in_transformers(folder, test)
    bars = {
        f"answers in the trained form: {form:.1%} (base {base_form:.1%}), at least {IN_FORM:.0%}": form >= IN_FORM,
        f"right answers: {right:.1%}, more than the base's {base_right:.1%}": right > base_right,
        f"the same answer in transformers: {same} of {COMPARED}": same == COMPARED,
    }
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes, in {folder}")
    for text, met in bars.items():
        print(f"{'met' if met else 'MISSED'}  {text}")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Small tasks that a rule can judge, sorting and reversing digits, and how well a model does them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from qwen_jax import sharding
from qwen_jax.engine import Capacity, Completion, Request, Sampling, generate, load
from qwen_jax.text.chat import FORMATS, encode
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from qwen_jax.weights.usage import turn_ends
from train.objectives.dpo import log_probs
from train.rewards.verifiers import tagged

FORM = FORMATS["qwen3-instruct-2507"]
DIGITS = range(4, 7)  # of a task
BOTH = ("sort", "sort", "reverse")
# How many of which: read at first, tuned to answer, asked and judged, compared, and what no run sees.
COUNTS = {
    "texts": (4500, BOTH),
    "chats": (4500, BOTH),
    "prompts": (2000, ("reverse",)),
    "pairs": (1500, ("reverse",)),
    "test": (400, ("sort", "reverse")),
}
ROWS, NEW_TOKENS, PAGE = 128, 16, 32

Task = Mapping[str, str]  # its prompt and its answer


def write_data(folder: Path) -> None:
    """Texts, conversations, prompts, pairs of a right and a wrong answer, and what no run sees; all of other digits."""
    draw, seen = random.Random(0), set()
    made = {name: _tasks(draw, seen, *what) for name, what in COUNTS.items()}
    rows = {
        "texts": [{"text": f"user\n{each['prompt']}\nassistant\n{_said(each['answer'])}\n"} for each in made["texts"]],
        "chats": [{"messages": conversation(each)} for each in made["chats"]],
        "prompts": made["prompts"],
        "pairs": [_pair(draw, each) for each in made["pairs"]],
        "test": made["test"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))


def read_tests(folder: Path, kind: str) -> list[Task]:
    """The tasks of a kind that no run sees."""
    tasks = map(json.loads, (folder / "test.jsonl").read_text().splitlines())
    return [task for task in tasks if task["prompt"].startswith(kind)]


def conversation(task: Task) -> list[dict[str, str]]:
    """A task and its right answer."""
    return [{"role": "user", "content": task["prompt"]}, {"role": "assistant", "content": _said(task["answer"])}]


def answers(path: Path, tasks: Sequence[Task], *, temperature: float, samples: int = 1) -> list[list[str]]:
    """What a model answers to each task: `samples` times, or with temperature 0 its likeliest tokens."""
    with open_model(path) as source:
        tokenizer = source.tokenizer()
        capacity = Capacity(max_rows=ROWS, max_length=2 * PAGE, cache_tokens=ROWS * 2 * PAGE, page_size=PAGE)
        engine = load(source, tokenizer, mesh=sharding.make_mesh(devices=jax.devices()[:1]), capacity=capacity)
    stops, jobs = frozenset({tokenizer.end_of_text}) | turn_ends(tokenizer), []
    for number in range(len(tasks) * samples):
        asked = FORM.render(conversation(tasks[number // samples])[:1], add_generation_prompt=True)
        request = Request(
            prompt=encode(tokenizer, asked).ids,
            max_new_tokens=NEW_TOKENS,
            sampling=Sampling(temperature=temperature),
            row=number,
            stop_ids=stops,
        )
        jobs.append((request, Completion(tokenizer, stops, ())))
    generate(engine, jobs)
    texts = [completion.text for _, completion in jobs]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def right(path: Path, tasks: Sequence[Task], *, temperature: float = 0.0) -> float:
    """The fraction of tasks that a model answers rightly, word for word."""
    made = answers(path, tasks, temperature=temperature)
    return float(np.mean([tagged(text, task["answer"]) for (text,), task in zip(made, tasks, strict=True)]))


def answer_loss(path: Path, tasks: Sequence[Task]) -> float:
    """How unlikely right answers are to a model, in nats per token."""
    with open_model(path) as source, jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        tokenizer, config = source.tokenizer(), source.config
        params = load_params(source, dtype="float32", stacked=False)
        encoded = [encode(tokenizer, FORM.render(conversation(task))) for task in tasks]
        ids, weights = np.zeros((len(tasks), 2 * PAGE), np.int32), np.zeros((len(tasks), 2 * PAGE), np.float32)
        for row, each in enumerate(encoded):
            ids[row, : len(each.ids)], weights[row, : len(each.ids)] = each.ids, each.mask
        positions = np.broadcast_to(np.arange(2 * PAGE - 1, dtype=np.int32), ids[:, 1:].shape)
        batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions, "segments": positions * 0 + 1}
        found = jax.jit(log_probs, static_argnums=0)(config, params, batch)
        return -float(np.average(np.asarray(found), weights=weights[:, 1:]))


def _tasks(draw: random.Random, seen: set[str], count: int, kinds: Sequence[str]) -> list[Task]:
    """So many of the kinds in turn, of digits that were never asked before."""
    made: list[Task] = []
    while len(made) < count:
        digits = "".join(draw.choices("0123456789", k=draw.choice(DIGITS)))
        if digits in seen or digits == "".join(sorted(digits)):
            continue
        seen.add(digits)
        kind = kinds[len(made) % len(kinds)]
        made.append(
            {"prompt": f"{kind} {digits}", "answer": "".join(sorted(digits)) if kind == "sort" else digits[::-1]}
        )
    return made


def _pair(draw: random.Random, task: Task) -> dict[str, object]:
    """A task, its answer, and that answer with two different digits exchanged."""
    asked, good = conversation(task)
    wrong = list(task["answer"])
    while "".join(wrong) == task["answer"]:
        i, j = draw.sample(range(len(wrong)), 2)
        wrong[i], wrong[j] = wrong[j], wrong[i]
    return {"prompt": [asked], "chosen": [good], "rejected": [good | {"content": _said("".join(wrong))}]}


def _said(answer: str) -> str:
    return f"<answer>{answer}</answer>"

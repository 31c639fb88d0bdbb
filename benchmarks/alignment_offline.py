"""Reward models and DPO that really learn, from scratch on a CPU: three seeds of a task judged by a rule.

    python benchmarks/alignment_offline.py

From the root of the repository. Of each seed a small model is trained to sort digits, with a third of its answers
wrong; then a reward model and a DPO run begin with it, on pairs of a sorted answer and one with two digits exchanged,
and are measured on prompts that neither has seen. Trains by the path of `python -m train`; what is there already in
runs/alignment is not trained again. Writes docs/alignment.png and the measured part of docs/alignment.md.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
from small_runs import GREY, picture, train, write_measured

from train.record import METRICS, rows

RUNS, PAGE, PICTURE = Path("runs/alignment"), Path("docs/alignment.md"), Path("docs/alignment.png")
SEEDS = (0, 1, 2)
WRONG = 0.33  # of the answers that the first model learns
LEAST_ACCURACY = 0.7  # of a reward model, on held-out pairs

COMMON = {
    "data.tokenizer.vocab_size": 259,
    "data.sequence_length": 96,
    "data.held_out": 0.1,
    "model.max_position": 96,
    "model.width": 64,
    "model.head_dim": 32,
    "model.mlp_width": 192,
    "batch_size": 8,
    "evaluation.every": 50,
    "evaluation.batches": 0,
}
TUNED = {
    "model": "@Pretrained",
    "model.dtype": "float32",
    "data.source": "@Preferences",
    "data.source.format": "qwen3-instruct-2507",
}

TEXT = """
| seed | reward model: accuracy | DPO: accuracy | reward margin | loss | chosen, nats | rejected, nats |
| --- | --- | --- | --- | --- | --- | --- |
{table}

A model of the shape of [configs/quickstart.gin](../configs/quickstart.gin) but half as wide learns to sort six
digits from 3,000 conversations, of whose answers a third has two digits exchanged; then 3,000 pairs say which of two
answers is sorted. Accuracy is over pairs of prompts that no run has seen; before the first step it is 50% by chance.
Chosen and rejected are how much likelier than before DPO makes such answers.

![accuracy on held-out pairs](alignment.png)

`python benchmarks/alignment_offline.py` trains, measures, and writes this part of the page.
"""


def exchanged(draw: random.Random, digits: list[int]) -> list[int]:
    """Sorted digits of which two different ones have changed places."""
    while True:
        i, j = sorted(draw.sample(range(len(digits)), 2))
        if digits[i] != digits[j]:
            made = list(digits)
            made[i], made[j] = made[j], made[i]
            return made


def write_data(folder: Path) -> None:
    """Conversations to learn from, and pairs of other prompts."""
    draw, spell = random.Random(0), lambda digits: " ".join(map(str, digits))
    chats, pairs, seen = [], [], set()
    while len(pairs) < 3000:
        digits = [draw.randrange(10) for _ in range(6)]
        if len(set(digits)) < 3 or tuple(digits) in seen:
            continue
        seen.add(tuple(digits))
        prompt = [{"role": "user", "content": spell(digits)}]
        good, bad = sorted(digits), exchanged(draw, sorted(digits))
        say = lambda answer: [{"role": "assistant", "content": spell(answer)}]
        if len(chats) < 3000:
            chats.append({"messages": prompt + say(bad if draw.random() < WRONG else good)})
        else:
            pairs.append({"prompt": prompt, "chosen": say(good), "rejected": say(bad)})
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def run(seed: int) -> dict[str, list[dict]]:
    """The held-out rows of a seed's reward model and of its DPO."""
    folder = RUNS / str(seed)
    common = COMMON | {"seed": seed}
    chats = {"data.source": "@Conversations", "data.source.path": str(RUNS / "data/chats.jsonl")}
    first = common | chats | {"data.source.format": "qwen3-instruct-2507", "steps": 300, "checkpoint.every": 300}
    train(folder / "sft", first | {"data.tokens": str(RUNS / "tokens-chats"), "schedule.warmup_steps": 40})
    tuned = common | TUNED | {"model.path": str(folder / "sft"), "data.source.path": str(RUNS / "data/pairs.jsonl")}
    tuned |= {"data.tokenizer": "@TokenizerFile", "data.tokenizer.path": str(folder / "sft/tokenizer.json")}
    tuned |= {"data.tokens": str(RUNS / "tokens-pairs"), "schedule.warmup_steps": 10}
    stages = {
        "reward": {"objective": "@Reward", "optimizer.peak_lr": 3e-3, "steps": 300, "checkpoint.every": 300},
        "dpo": {
            "objective": "@DPO",
            "objective.beta": 0.1,
            "optimizer.peak_lr": 2e-4,
            "steps": 200,
            "checkpoint.every": 200,
        },
    }
    for name, changes in stages.items():
        train(folder / name, {k: v for k, v in tuned.items() if k not in _SHAPE} | changes)
    return {name: [row for row in rows(folder / name / METRICS) if "held_out_loss" in row] for name in stages}


# Which come with the model.
_SHAPE = ("model.max_position", "model.width", "model.head_dim", "model.mlp_width", "data.tokenizer.vocab_size")


def draw_picture(found: dict[int, dict[str, list[dict]]]) -> None:
    figure, axes = picture()
    for name, color in (("reward", "#b8323a"), ("dpo", "#7a9cc6")):
        for seed, of_seed in found.items():
            points = np.array([(row["step"], row["held_out_accuracy"]) for row in of_seed[name]])
            label = {"reward": "reward model", "dpo": "DPO"}[name] if seed == SEEDS[0] else None
            axes.plot(*points.T, color=color, linewidth=2, marker="o", markersize=4, label=label)
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle=(0, (5, 4)))
    axes.set(xlabel="step", ylabel="accuracy on held-out pairs", xlim=(0, None), ylim=(0.4, 1.02))
    axes.set_title("three seeds each", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(PICTURE)


def main() -> int:
    """1 if a bar is missed."""
    write_data(RUNS / "data")
    found = {seed: run(seed) for seed in SEEDS}
    lines, passed = [], True
    for seed, of_seed in found.items():
        reward, (first, *_, last) = of_seed["reward"][-1], of_seed["dpo"]
        shown = [f"{seed}", f"{reward['held_out_accuracy']:.1%}", f"{last['held_out_accuracy']:.1%}"]
        shown += [f"{last[f'held_out_{name}']:.3f}" for name in ("margin", "loss")]
        shown += [f"{last[f'held_out_{name}'] / 0.1:+.2f}" for name in ("chosen", "rejected")]
        lines.append(f"| {' | '.join(shown)} |")
        learns = reward["held_out_accuracy"] >= LEAST_ACCURACY
        raises = last["held_out_margin"] > max(0, first["held_out_margin"]) and last["held_out_accuracy"] > 0.5
        raises &= last["held_out_accuracy"] >= first["held_out_accuracy"]
        print(f"seed {seed}: reward model {'ok' if learns else 'FAILED'}, DPO {'ok' if raises else 'FAILED'}")
        passed &= learns and raises
    print("\n".join(lines))
    draw_picture(found)
    write_measured(PAGE, TEXT.format(table="\n".join(lines)))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())

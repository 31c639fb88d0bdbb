"""GRPO on CPU: episodes beside the engine alone on the same requests, and whole steps beside TRL's GRPOTrainer.

    python benchmarks/rollout_cpu.py            # REDUCED=1 in the environment: a tiny model, to see that all sides run

Random weights hardly ever end a text, so every completion is as long as it may be. Both sides begin with the same
folder, in float32, without a reference model, and are rewarded by a function in Python.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from side_by_side import SHAPE, THREADS, Bar, judge, measure, one_side, require

from qwen_jax.text import train_bpe

REDUCED = bool(os.environ.get("REDUCED"))
RUNS = Path("runs/rollout_cpu/reduced" if REDUCED else "runs/rollout_cpu")
MODEL, PROMPTS = RUNS / "model", RUNS / "prompts.jsonl"
VOCABULARY, LAYERS = (512, 2) if REDUCED else (16384, 6)
COMPLETIONS, GROUPS, PROMPT, NEW = (4, 2, 8, 8) if REDUCED else (8, 4, 64, 96)
STEPS, WARM_UP = (3, 1) if REDUCED else (6, 2)
ROWS, PAGE = COMPLETIONS * GROUPS, 32

REWARD = '''
def reward(prompts, completions, **columns):
    """The share of small letters."""
    return [sum(map(str.islower, text)) / (len(text) + 1) for text in completions]
'''


def prepare() -> None:
    """Random weights of the shape of the benchmarks, a tokenizer that fits them, prompts and the reward."""
    import torch
    import transformers

    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(file.read_text(errors="ignore") for file in files)
    tokenizer = train_bpe([text], vocab_size=VOCABULARY)
    shape = dict(width=64, num_heads=2, num_kv_heads=1, mlp_width=192) if REDUCED else SHAPE
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=shape["width"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        intermediate_size=shape["mlp_width"],
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.end_of_text,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(MODEL)
    (MODEL / "tokenizer.json").write_bytes(tokenizer.to_bytes())
    ids = tokenizer.encode(text[:1_000_000])
    pieces = [tokenizer.decode(ids[start : start + PROMPT]) for start in range(0, 400 * PROMPT, PROMPT)]
    PROMPTS.write_text("".join(json.dumps({"prompt": piece}) + "\n" for piece in pieces))
    (RUNS / "reward.py").write_text(REWARD)


def ours() -> dict[str, float]:
    """The path of `python -m train`."""
    from train import run as training
    from train.config import AdamW, Checkpointing, Cosine, Evaluation, Pretrained, TrainConfig
    from train.data.config import Data, Prompts, TokenizerFile
    from train.record import METRICS, rows
    from train.reinforcement import GRPO, Rollout
    from train.rewards.config import Function, RewardSource

    shutil.rmtree(RUNS / "run", ignore_errors=True)
    config = TrainConfig(
        run_dir=str(RUNS / "run"),
        model=Pretrained(path=str(MODEL), dtype="float32"),
        data=Data(
            source=Prompts(path=str(PROMPTS), chat=False),
            tokenizer=TokenizerFile(path=str(MODEL)),
            sequence_length=PROMPT + NEW,
            held_out=0.0,
        ),
        objective=GRPO(
            kl=0.0,
            rollout=Rollout(completions=COMPLETIONS, max_new_tokens=NEW),
            rewards=(RewardSource(source=Function(path=str(RUNS / "reward.py"))),),
        ),
        batch_size=ROWS,
        steps=STEPS,
        optimizer=AdamW(peak_lr=1e-6),
        schedule=Cosine(warmup_steps=0),
        checkpoint=Checkpointing(every=STEPS),
        evaluation=Evaluation(every=STEPS),
    )
    assert training.run(config, "") == 0
    found = list(rows(RUNS / "run" / METRICS))[WARM_UP:]
    return {
        "step": statistics.median(row["seconds"] for row in found),
        "token": statistics.median(1e3 / row["rollout_tokens_per_second"] for row in found),
    }


def engine() -> dict[str, float]:
    """The engine alone on the requests of an episode."""
    import jax

    from qwen_jax import sharding
    from qwen_jax.engine import Capacity, Request, Sampling, load
    from qwen_jax.weights.source import open_model

    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    with open_model(MODEL) as source:
        tokenizer = source.tokenizer()
        longest = max(len(tokenizer.encode(prompt)) for prompt in prompts) + NEW
        pages = ROWS * -(-longest // PAGE) * PAGE
        capacity = Capacity(max_rows=ROWS, max_length=longest, cache_tokens=pages, page_size=PAGE)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        model = load(source, tokenizer, mesh=mesh, capacity=capacity, dtype="float32")

    def episode(number: int) -> float:
        asked, start = prompts[number * GROUPS : (number + 1) * GROUPS], time.perf_counter()
        for row, prompt in enumerate(prompt for prompt in asked for _ in range(COMPLETIONS)):
            model.add(
                Request(
                    prompt=tokenizer.encode(prompt),
                    max_new_tokens=NEW,
                    sampling=Sampling(temperature=1.0),
                    seed=number,
                    row=row,
                    stop_ids=frozenset({tokenizer.end_of_text}),
                    logprobs=0,
                )
            )
        count = 0
        while model.busy:
            count += len(model.step())
        return 1e3 * (time.perf_counter() - start) / count

    return {"token": statistics.median([episode(number) for number in range(STEPS)][WARM_UP:])}


def trl() -> dict[str, float]:
    """TRL's GRPOTrainer, with its own defaults but for recomputation, which it does not need here."""
    import datasets  # pyright: ignore[reportMissingImports]
    import torch
    import transformers
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.set_num_threads(THREADS)
    names: dict[str, Any] = {}
    exec(REWARD, names)
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    arguments = GRPOConfig(
        output_dir=str(RUNS / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        num_generations=COMPLETIONS,
        max_completion_length=NEW,
        max_steps=STEPS,
        learning_rate=1e-6,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(MODEL / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    trainer = GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        args=arguments,
        reward_funcs=names["reward"],
        train_dataset=datasets.Dataset.from_json(str(PROMPTS)),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    return {"step": statistics.median(later - before for before, later in itertools.pairwise(times[WARM_UP - 1 :]))}


SIDES = {
    "ours": ours,
    "engine": engine,
    "trl": trl,
}
BARS = [
    Bar("rollout_beside_engine_rate", ["ours"], ["engine"], "token", 0.8, higher_is_better=True),
    Bar("grpo_step_rate", ["ours"], ["trl"], "step", 2.5, higher_is_better=True),
]

if __name__ == "__main__":
    one_side(SIDES)
    require("torch", "transformers", "trl", "datasets")
    if not PROMPTS.exists():
        prepare()
    units = {
        "step": f"seconds per step of {ROWS} completions of {NEW} tokens",
        "token": "milliseconds per sampled token, all completions together",
    }
    raise SystemExit(judge(measure(list(SIDES), rounds=1, units=units), BARS))

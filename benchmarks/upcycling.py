"""A dense model that becomes a mixture of experts and is trained on, beside itself trained on for as many steps.

    python benchmarks/upcycling.py

From the root of the repository. Trains by the path of `python -m train`, from configs/quickstart.gin; what is there
already in runs/upcycling is not trained again. Writes docs/upcycling.png and the measured part of docs/upcycling.md.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from small_runs import GREY, picture, train, write_measured

from qwen_jax.weights import upcycle
from qwen_jax.weights.source import open_model
from train.record import METRICS, rows

RUNS, PAGE, PICTURE = Path("runs/upcycling"), Path("docs/upcycling.md"), Path("docs/upcycling.png")
STEPS, CONTINUED_STEPS = 500, 300
MLP_WIDTH = 384

COMMON = {
    "data.tokens": str(RUNS / "tokens"),
    "data.held_out": 0.005,
    "evaluation.every": 50,
    "evaluation.batches": 0,  # all, so that every point of a curve is over the same text
}
# Of the shape of Qwen3, whose mixtures have no shared expert: nothing but the experts' weights decides what is mixed.
DENSE = {
    **COMMON,
    "model.mlp_width": MLP_WIDTH,
    "model.qkv_bias": False,
    "model.qk_norm": True,
    "steps": STEPS,
    "checkpoint.every": STEPS,
}
CONTINUED = {
    **COMMON,
    "seed": 1,  # other rows than those of the first steps of the dense run
    "model": "@Pretrained",
    "model.dtype": "float32",
    "steps": CONTINUED_STEPS,
    "optimizer.peak_lr": 4e-3,
    "schedule.warmup_steps": 20,
    "checkpoint.every": CONTINUED_STEPS,
}

TEXT = """
{table}
A dense model of the shape of Qwen3 ([configs/quickstart.gin](../configs/quickstart.gin) with norms of queries and keys)
after {steps} steps, and what becomes of it in {more} more: the same batches and learning rates for all, a fresh
optimiser, files of the Python standard library held out. The loss of the first batch is that of the weights as they
were upcycled. A token meets twice the inner width of the dense MLP, so steps are equal and work is not.

![held-out loss](upcycling.png)

`python benchmarks/upcycling.py` trains, measures, and writes this part of the page.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      name: in the table.
      run: below RUNS.
      color: in the picture.
      options: of `python -m qwen_jax.weights.upcycle`; empty for the dense model itself.
    """

    name: str
    run: str
    color: str
    options: str = ""


ROWS = (
    Row("dense, trained on", "dense-on", GREY),
    Row(
        "4 whole copies, 2 of them per token",
        "copies",
        "#4292c6",
        f"--experts 4 --top-k 2 --expert-ffn {MLP_WIDTH} --reinit 0",
    ),
    Row(
        "8 shuffled halves, 4 of them per token, 50% drawn anew",
        "recipe",
        "#b8323a",
        f"--experts 8 --top-k 4 --expert-ffn {MLP_WIDTH // 2} --reinit 0.5",
    ),
)


def curve(run: str, kind: str) -> dict[int, float]:
    """A loss of a run by step: kind is "loss" or "held_out_loss"."""
    return {row["step"]: row[kind] for row in rows(RUNS / run / METRICS) if kind in row}


def table() -> str:
    """The first and the last losses, and from which step on the held-out loss is below that of the dense model."""
    head = (
        "",
        "parameters",
        "active per token",
        "loss of the first batch",
        "held out, at the end",
        "below dense from step",
    )
    lines = [head, ("---",) * len(head)]
    dense = curve(ROWS[0].run, "held_out_loss")
    for row in ROWS:
        with open_model(RUNS / row.run) as source:
            config = source.config
        held_out = curve(row.run, "held_out_loss")
        above = [step for step, loss in held_out.items() if loss >= dense[step]]
        below = [step for step in held_out if step > max(above, default=0)]
        lines.append(
            (
                row.name,
                f"{config.num_parameters:,}",
                f"{config.num_active_parameters:,}",
                f"{curve(row.run, 'loss')[1]:.6f}",
                f"{held_out[CONTINUED_STEPS]:.4f}",
                f"{below[0]}" if below else "-",
            )
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw() -> None:
    """Held-out losses over the steps, those of the dense model before it was upcycled first."""
    figure, axes = picture()
    before = {step - STEPS: loss for step, loss in curve("dense", "held_out_loss").items()}
    axes.plot(before.keys(), before.values(), color=GREY, linewidth=1, label="dense, before")
    for row in ROWS:
        held_out = curve(row.run, "held_out_loss")
        axes.plot(held_out.keys(), held_out.values(), color=row.color, linewidth=2, label=row.name)
    last = before[0]
    axes.axhline(last, color=GREY, linewidth=1, linestyle=(0, (5, 4)))
    axes.set(xlabel="steps after upcycling", ylabel="held-out loss, nats per token", xlim=(-STEPS / 2, CONTINUED_STEPS))
    axes.set_ylim(min(map(min, (curve(row.run, "held_out_loss").values() for row in ROWS))) - 0.05, last + 0.7)
    axes.legend(frameon=False)
    figure.savefig(PICTURE)


def main() -> int:
    """The exit code."""
    train(RUNS / "dense", DENSE)
    for row in ROWS:
        path = RUNS / "dense"
        if row.options:
            path = RUNS / f"{row.run}-upcycled"
            if not path.exists():
                upcycle.main([str(RUNS / "dense"), str(path), *row.options.split()])
        balance = {"objective.balance": 0.01} if row.options else {}
        train(RUNS / row.run, {**CONTINUED, "model.path": str(path), **balance})
    measured = table()
    print(measured)
    draw()
    write_measured(PAGE, TEXT.format(table=measured, steps=STEPS, more=CONTINUED_STEPS))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which rows run together, by lengths alone."""

from __future__ import annotations

from qwen_jax.engine.pages import Pages
from qwen_jax.engine.request import Request
from qwen_jax.engine.scheduler import Row, Scheduler

PAGE, ROWS, PROMPT, NEW = 4, 8, 4, 8


def test_a_cache_with_room_for_all_rows_runs_all_rows():
    """Those that came first have grown to their last page when the others' prompts are taken in."""
    pages = Pages(ROWS * -(-(PROMPT + NEW) // PAGE), PAGE)
    scheduler = Scheduler(pages, max_rows=ROWS, block=PAGE, most_pieces=1, room=lambda fillable: PAGE)
    for i in range(ROWS):
        row = Row(request=Request(prompt=[i] * PROMPT, max_new_tokens=NEW), number=i, kind=0, tokens=[i] * PROMPT)
        scheduler.add(row)
    for step in range(ROWS):
        plan = scheduler.plan()
        assert plan is not None and (len(plan.rows), len(plan.pieces)) == (step, 1)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.preemptions) == (ROWS, 0, 0)

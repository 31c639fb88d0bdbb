"""The same tasks under datatrove's executor leave the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.train.data.corpus.conftest import tree
from train.data.corpus.run import run

pytest.importorskip("datatrove")


# It forks a process of its own before it begins; other tests have made threads by then.
@pytest.mark.filterwarnings("ignore:.*fork")
def test_datatroves_local_executor_leaves_the_same_bytes(config, tmp_path):
    from datatrove.executor import LocalPipelineExecutor

    from train.data.corpus.datatrove import steps

    config, previous = replace(config, tokens=None, minhash=None, rules=None, decontaminate=None, domains=None), None
    for step in steps(config):
        logs = str(tmp_path / "logs" / step.name)
        previous = LocalPipelineExecutor(
            pipeline=[step], tasks=step.tasks, workers=1, logging_dir=logs, depends=previous
        )
    previous.run()
    other = replace(config, output=str(tmp_path / "ours"))
    run(other, "")
    made = {name: content for name, content in tree(other).items() if not name.startswith("report")}
    assert tree(config) == made

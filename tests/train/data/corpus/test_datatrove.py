"""The same tasks under datatrove's executors leave the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.train.data.corpus.conftest import tree
from train.data.corpus.run import run

pytest.importorskip("datatrove")


@pytest.fixture
def few_stages(config):
    """Those that need no more phases than show how they follow each other."""
    return replace(config, tokens=None, minhash=None, rules=None, decontaminate=None, domains=None)


def assert_same_bytes(config, tmp_path):
    """What is there is what a run in one process leaves, but for the report."""
    other = replace(config, output=str(tmp_path / "ours"))
    run(other, "")
    assert tree(config) == {name: content for name, content in tree(other).items() if not name.startswith("report")}


# It forks a process of its own before it begins; other tests have made threads by then.
@pytest.mark.filterwarnings("ignore:.*fork")
def test_datatroves_local_executor_leaves_the_same_bytes(few_stages, tmp_path):
    from datatrove.executor import LocalPipelineExecutor

    from train.data.corpus.datatrove import steps

    previous = None
    for step in steps(few_stages):
        logs = str(tmp_path / "logs" / step.name)
        previous = LocalPipelineExecutor(
            pipeline=[step], tasks=step.tasks, workers=1, logging_dir=logs, depends=previous
        )
    previous.run()
    assert_same_bytes(few_stages, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_leaves_the_same_bytes(few_stages, tmp_path):
    ray = pytest.importorskip("ray")
    from datatrove.executor import RayPipelineExecutor

    from train.data.corpus.datatrove import steps

    ray.init(num_cpus=2, include_dashboard=False)
    try:
        for step in steps(few_stages):
            logs = str(tmp_path / "logs" / step.name)
            RayPipelineExecutor(pipeline=[step], tasks=step.tasks, workers=2, logging_dir=logs).run()
    finally:
        ray.shutdown()
    assert_same_bytes(few_stages, tmp_path)

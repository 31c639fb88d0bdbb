"""What a run in the sandbox costs beside a bare process, alone and eight at once; and what a thousand runs leave.

    python benchmarks/sandbox.py [--runs 200] [--many 1000]

The program does nothing. Milliseconds of processor time count what all processes of a run took, ours included.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwen_jax.sandbox.grade import grade
from qwen_jax.sandbox.process import isolate
from qwen_jax.sandbox.run import run
from qwen_jax.sandbox.session import Session
from qwen_jax.sandbox.view import EXECUTABLE

AT_ONCE = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--many", type=int, default=1000)
    options = parser.parse_args()
    print(f"{isolate(allow_weak=False)}, {os.cpu_count()} cores\n")
    with Session() as session:
        session.run("")
        sides: dict[str, Callable[[], object]] = {
            "python -I -S -c pass": lambda: subprocess.run([EXECUTABLE, "-I", "-S", "-c", "pass"], env={}, check=True),
            "run": lambda: run("pass"),
            "grade": lambda: grade("def f(x): return x", "from program import f\nassert f(1) == 1"),
            "a cell of a session": lambda: session.run("pass"),
        }
        print("| | alone: median, ms | processor, ms | 8 at once: per run, ms |\n|---|---|---|---|")
        for name, call in sides.items():
            at_once = "-" if "session" in name else f"{throughput(call, options.runs):.1f}"
            median, processor = alone(call, options.runs)
            print(f"| {name} | {median:.1f} | {processor:.1f} | {at_once} |", flush=True)
    before = left_over()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert all(
            result.reason == "ok" for result in pool.map(lambda _: run("import os\nos.fork()"), range(options.many))
        )
    after = left_over()
    print(f"\n(descriptors, temporary files, children) before {options.many} runs {before}, after {after}")
    return int(after > before)


def alone(call: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median time on the clock and mean processor time of a call, in milliseconds."""
    seconds, before = [], processor_seconds()
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds), 1000 * (processor_seconds() - before) / runs


def throughput(call: Callable[[], object], runs: int) -> float:
    """Time on the clock of one of many calls, of which eight run at once, in milliseconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda _: call(), range(runs)))
    return 1000 * (time.perf_counter() - start) / runs


def processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def left_over() -> tuple[int, int, int]:
    children = sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children"))
    return len(os.listdir("/proc/self/fd")), len(os.listdir(tempfile.gettempdir())), children


if __name__ == "__main__":
    raise SystemExit(main())

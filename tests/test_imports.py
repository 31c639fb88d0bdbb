"""The direction of imports, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A layer may import those before it, and the leaves.
LAYERS = ["kernels", "ops", "model", "weights", "engine"]
LEAVES = {"errors", "command", "resumable", "config", "sharding", "bindings", "zoo", "text", "sandbox"}
ONLY_IN = {
    "flax": ["qwen_jax/model"],
    "optax": ["train"],
    "grain": ["train"],
    "orbax": ["qwen_jax/weights"],
    "safetensors": ["qwen_jax/weights"],
    "llguidance": ["qwen_jax/engine/structured"],
    **dict.fromkeys(("resiliparse", "py3langid", "datatrove"), ["train/data/corpus"]),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "h11", "pydantic", "prometheus_client"), ["infer/server"]),
    # The command that compares a forward pass with theirs, where a user has them.
    "torch": ["tests", "benchmarks", "qwen_jax/weights/forward.py"],
    "peft": ["tests"],
    "transformers": ["tests", "benchmarks", "qwen_jax/weights/forward.py"],
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_libraries_stay_in_their_rooms():
    for path in sources("qwen_jax", "train", "infer"):
        place = str(path.relative_to(ROOT))
        for name in imports(path):
            rooms = ONLY_IN.get(name.split(".")[0])
            assert rooms is None or place.startswith(tuple(rooms)), f"{place} imports {name}"


def test_the_library_is_layered():
    for path in sources("qwen_jax"):
        here = path.relative_to(ROOT / "qwen_jax").parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] not in ("train", "infer"), f"{path}: the library knows nothing of applications"
            if parts[0] != "qwen_jax" or len(parts) < 2 or parts[1] == here:
                continue
            assert here not in LEAVES or parts[1] in LEAVES, f"{path}: a leaf imports {name}"
            if here in LAYERS and parts[1] in LAYERS:
                assert LAYERS.index(parts[1]) < LAYERS.index(here), f"{path}: {here} imports {name}"


def test_the_applications_do_not_know_each_other():
    for here, other in (("train", "infer"), ("infer", "train")):
        for path in sources(here):
            assert not any(name.split(".")[0] == other for name in imports(path)), path


def test_nothing_reaches_into_private_jax():
    for path in sources("qwen_jax", "train", "infer", "tests", "benchmarks"):
        assert not any(name.startswith("jax._src") for name in imports(path)), path


@pytest.mark.parametrize("program", ["train", "train.data.synthesis", "train.scaling", "infer"])
def test_help_loads_no_jax(program):
    code = f"import sys, runpy; sys.argv = ['{program}', '--help']\n"
    code += f"try: runpy.run_module('{program}', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "assert 'jax' not in sys.modules, 'jax was loaded'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()

"""Decoding steps as the TPU compiler sees them, against what no step can do without. Nothing here runs on a TPU.

    python benchmarks/decode_tpu_static.py [CASE ...]

The bar: a step moves at most 1.15 times the bytes of the weights, read once, and of the keys and values of its rows.
What the compiled program moves is read from its text (train.plan.traffic), from two programs of few layers, and what
the kernel fetches, which it learns when it runs, is a formula: all rows are as long as the case says. A piece is of
one more row, whose keys and values the kernel reads again for each block of its queries.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from typing import Any

from qwen_jax import zoo
from qwen_jax.kernels.paged_attention import Blocks
from qwen_jax.ops.sampling import Sampling, Stages
from train.plan import hlo
from train.plan.chips import GIB
from train.plan.compiled import ENVIRONMENT
from train.plan.topology import Topology, parse
from train.plan.traffic import hbm_bytes

LAYERS = (2, 4)
BAR = 1.15
HALVINGS = 31  # of the ranks of float32, in search of a threshold
CHOICES = {"greedy": Sampling(temperature=0), "top-k and top-p": Sampling(top_k=20, top_p=0.95)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """`rows` of `context` tokens, each with one more; `piece` tokens of a prompt beside them."""

    model: str
    topology: str
    rows: int
    context: int
    piece: int = 0
    int8: bool = False

    @property
    def chips(self) -> Topology:
        return parse(self.topology)

    @property
    def chooses(self) -> bool:
        """Whether the choice of tokens is compiled for it, too."""
        return self.rows == 64 and not self.int8

    @property
    def page_size(self) -> int:
        return 128 if self.int8 else 32


B7, B72 = "Qwen2.5-7B", "Qwen2.5-72B"
CASES = {
    "7b-v5e-8x4096": Case(model=B7, topology="v5e:2x2", rows=8, context=4096),
    "7b-v5e-64x2048": Case(model=B7, topology="v5e:2x2", rows=64, context=2048),
    "7b-v5e-8x4096-piece": Case(model=B7, topology="v5e:2x2", rows=8, context=4096, piece=512),
    "7b-v5e-64x2048-int8": Case(model=B7, topology="v5e:2x2", rows=64, context=2048, int8=True),
    "7b-v6e-8x4096": Case(model=B7, topology="v6e:2x2", rows=8, context=4096),
    "7b-v6e-64x2048": Case(model=B7, topology="v6e:2x2", rows=64, context=2048),
    "7b-v6e-8x4096-piece": Case(model=B7, topology="v6e:2x2", rows=8, context=4096, piece=512),
    "7b-v6e-64x2048-int8": Case(model=B7, topology="v6e:2x2", rows=64, context=2048, int8=True),
    "72b-v6e-8x4096": Case(model=B72, topology="v6e:2x4", rows=8, context=4096),
    "72b-v6e-64x2048": Case(model=B72, topology="v6e:2x4", rows=64, context=2048),
    "72b-v6e-8x4096-piece": Case(model=B72, topology="v6e:2x4", rows=8, context=4096, piece=512),
    "72b-v5e-16x4096": Case(model=B72, topology="v5e:4x4", rows=16, context=4096),
    "72b-v5e-64x2048": Case(model=B72, topology="v5e:4x4", rows=64, context=2048),
}


def measure(case: Case) -> dict[str, Any]:
    """What the compiler makes of a case, in bytes of one device. In a process of its own."""
    import jax

    from qwen_jax import sharding
    from train.plan.aot import devices

    mesh = sharding.make_mesh(tensor=case.chips.num_devices, devices=devices(case.chips))
    with jax.set_mesh(mesh):
        _, params, cache, *_ = arguments(case, zoo.published(case.model).num_layers)
        return {
            "weights": _bytes(params),
            "looked_up": _bytes(params["embed"]) if "head" in params else 0,
            "cache": _bytes(cache),
            "steps": [compile_step(case, layers) for layers in LAYERS],
            "choices": {name: compile_choice(case, how) for name, how in CHOICES.items() if case.chooses},
        }


def compile_step(case: Case, layers: int) -> dict[str, Any]:
    """The step of so many layers."""
    from qwen_jax.engine.steps import compute

    config, params, cache, last, inputs = arguments(case, layers)
    program = compute.lower(config, params, cache, last, inputs).compile()
    memory, text = program.memory_analysis(), program.as_text()
    found, sent = hlo.read(text), {}
    for each in found.collectives:
        count, size = sent.get(each.kind, (0, 0))
        sent[each.kind] = (count + each.executions, size + each.executions * each.bytes)
    return {
        "moved": hbm_bytes(text),
        "temporaries": memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "kernels": sum(found.kernels.values()),
        "sent": sent,
    }


def compile_choice(case: Case, sampling: Sampling) -> float:
    """Microseconds at most, by the compiler's cycles, of choosing a token for each row."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qwen_jax import sharding
    from qwen_jax.engine.steps import Choice, choose

    column = lambda dtype: np.zeros(case.rows, dtype)
    numbers = dict(places=column(np.int32), positions=column(np.int32), seeds=column(np.uint32), rows=column(np.uint32))
    choice = Choice(**numbers, stages=jax.eval_shape(lambda: Stages.of([sampling] * case.rows)))
    vocabulary = zoo.published(case.model).vocab_size
    split = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(sharding.ROWS))
    logits = jax.ShapeDtypeStruct((case.rows, vocabulary), jnp.float32, sharding=split)
    last = jax.ShapeDtypeStruct((case.rows + 1,), jnp.int32)
    program = choose.lower(logits, last, None, choice, num_tokens=vocabulary, top=None).compile()
    computations, entry = hlo.parse(program.as_text())
    cycles = lambda name: sum(int(x.attribute(r'"estimated_cycles":"(\d+)"', "0")) for x in computations[name])
    loops = [x.attribute(r"body=%([\w.\-]+)") for x in computations[entry] if x.operation == "while"]
    return 1e6 * (cycles(entry) + HALVINGS * sum(map(cycles, loops))) / case.chips.chip.clock


def arguments(case: Case, layers: int) -> tuple[Any, ...]:
    """What `compute` takes, as shapes on the current mesh: config, parameters, cache, last tokens and inputs."""
    import jax
    import jax.numpy as jnp

    from qwen_jax import model
    from qwen_jax.engine.packing import Capacity, Packing
    from qwen_jax.engine.steps import Inputs
    from qwen_jax.ops.pages import Rows, kv_heads

    config = zoo.published(case.model)
    config = dataclasses.replace(config, num_layers=layers, dtype="bfloat16", param_dtype="bfloat16")
    stored = jax.eval_shape(lambda: model.unstack_layers(model.init(config, jax.random.key(0))))
    params = jax.eval_shape(model.repeat_kv_heads, stored)
    width = case.context // case.page_size
    num_pages = (case.rows + bool(case.piece)) * width
    cache = jax.eval_shape(lambda: model.make_cache(config, num_pages, case.page_size, int8=case.int8))
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    rows = lambda count, new: Rows(lengths=ints(count), table=ints(count, width), counts=ints(count), width=new)
    inputs = Inputs(rows=rows(case.rows, 1), places=ints(case.rows))
    if case.piece:
        packing = Packing(capacity=Capacity(), width=width, least=1, prompts=False, padding_costs=False)
        blocks = case.piece // packing.block
        pieces = dict(pieces=rows(blocks, packing.block), tokens=ints(case.piece), ends=ints(blocks))
        inputs = dataclasses.replace(inputs, **pieces)
    config = dataclasses.replace(config, num_kv_heads=kv_heads(config.num_kv_heads))
    return config, params, cache, ints(case.rows + 1), inputs


def _bytes(tree: Any) -> int:
    import jax

    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def in_child(name: str) -> dict[str, Any]:
    """`measure` in a process of its own, which the compiler's failed checks would end."""
    print(f"{name} …", file=sys.stderr, flush=True)
    env = os.environ | ENVIRONMENT
    done = subprocess.run([sys.executable, __file__, "--measure", name], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fetched(case: Case) -> int:
    """Tokens whose keys and values the kernel reads."""
    config = zoo.published(case.model)
    group = config.num_heads // max(config.num_kv_heads, case.chips.num_devices)
    block = max(16, Blocks().rows // group // 16 * 16)
    ends = [min(start + block, case.piece) for start in range(0, case.piece, block)]
    return case.rows * case.context + sum(case.context - case.piece + end for end in ends)


def report(name: str, found: dict[str, Any]) -> bool:
    """Prints a case, and whether it reaches the bar."""
    case, (few, many) = CASES[name], found["steps"]
    num_layers, (low, high) = zoo.published(case.model).num_layers, LAYERS
    extended = lambda a, b: a + (b - a) / (high - low) * (num_layers - low)
    per_token = found["cache"] / (case.rows + bool(case.piece)) / case.context
    floor = found["weights"] - found["looked_up"] + per_token * case.context * (case.rows + bool(case.piece))
    moved = extended(few["moved"], many["moved"]) + per_token * fetched(case)
    held = found["weights"] + found["cache"] + max(few["temporaries"], many["temporaries"])
    chips, gib, gb = case.chips, 1 / GIB, 1e-9
    print(f"\n{name}: {case.model} on {case.topology}, tensor={chips.num_devices}; per device and step")
    print(f"  held {held * gib:.2f} GiB of {chips.hbm * gib:.2f}: weights {found['weights'] * gib:.2f}, ", end="")
    print(
        f"cache {found['cache'] * gib:.2f}, temporaries {max(few['temporaries'], many['temporaries']) / 2**20:.1f} MiB"
    )
    print(
        f"  moved {moved * gb:.3f} GB, at least {floor * gb:.3f}, {floor / chips.bandwidth * 1e3:.2f} ms at HBM's rate"
    )
    for kind in many["sent"]:
        (first, size), (second, larger) = few["sent"].get(kind, (0, 0)), many["sent"][kind]
        count, layer = (second - first) / (high - low), (larger - size) / (high - low)
        print(f"  {kind}: {count:g} per layer, {layer / 1e3:.0f} kB; beside the layers ", end="")
        print(f"{first - low * count:g}, {(size - low * layer) / 1e3:.0f} kB")
    for how, microseconds in found["choices"].items():
        print(f"  choosing, {how}: {microseconds:.0f} us at most")
    reached = moved / floor <= BAR
    print(f"BAR decode-{name} {moved / floor:.3f} <={BAR:.2f} {'ok' if reached else 'short'}", flush=True)
    return reached


def main(names: list[str]) -> int:
    """The exit code: 1 if any bar is short."""
    print("Estimates of the TPU compiler; nothing ran on a TPU.")
    return 0 if all([report(name, in_child(name)) for name in names or CASES]) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(CASES[sys.argv[2]])))
    else:
        sys.exit(main(sys.argv[1:]))

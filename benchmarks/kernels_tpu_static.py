"""Flash attention against jax's splash attention, as the TPU compiler sees them. Nothing here runs on a TPU.

    python benchmarks/kernels_tpu_static.py [CHIP ...]

Both sides are compiled by the same libtpu, 8 heads of 128 in bfloat16, causal. The compiler's static profile follows
the program of the scalar core with a model of the memory, and gives cycles; bundles are instructions of the inner loop,
times how often it runs. Neither was ever calibrated against hardware: they compare kernels, and predict no time. Splash
reads its schedule from scalar memory, which the profiler takes for zeros, so the same is computed in its place.
"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
import tempfile

from train.plan.compiled import ENVIRONMENT

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GIGAHERTZ = {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75}
HEADS, DIM = 8, 128
# The best of splash on all three chips.
BLOCK_Q, BLOCK_KV, BLOCK_KV_COMPUTE = 1024, 1024, 512
# Both sides in one compilation; forward needs no residuals, backward is the gradient of all three inputs.
SIDES = ("ours", "splash", "splash unfused")
MIB = 2**20


def forward_bar(chip: str) -> float:
    return 0.8 if chip == "v6e" else 1.0


def ours(chip: str, length: int):
    """The attention function and its inputs."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.kernels.flash_attention import flash_attention

    # Two rows of half the heads: the profiler does not take an offset that is alone in its array for zero.
    x = jax.ShapeDtypeStruct((2, HEADS // 2, length, DIM), jnp.bfloat16)
    offset = jax.ShapeDtypeStruct((2,), jnp.int32)
    attend = lambda q, k, v, offset: flash_attention(q, k, v, scale=DIM**-0.5, query_offset=offset, generation=chip)[0]
    return attend, (x, x, x, offset)


def splash(length: int, *, fused: bool):
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    def schedule(h, i, j, data_next, block_mask, mask_next, next_i=False):
        run = j * BLOCK_KV < (i + 1) * BLOCK_Q
        block = jnp.where(run, i, (j * BLOCK_KV) // BLOCK_Q) if next_i else jnp.where(run, j, 0)
        return block, None, run, True

    kernel._next_nonzero = schedule
    unfused = {} if fused else dict(block_q_dq=BLOCK_Q, block_kv_dq=BLOCK_KV)
    sizes = kernel.BlockSizes(
        block_q=BLOCK_Q,
        block_kv=BLOCK_KV,
        block_kv_compute=BLOCK_KV_COMPUTE,
        block_q_dkv=BLOCK_Q,
        block_kv_dkv=BLOCK_KV,
        block_kv_dkv_compute=BLOCK_KV_COMPUTE,
        use_fused_bwd_kernel=fused,
        **unfused,
    )
    heads = mask.MultiHeadMask([mask.CausalMask((length, length)) for _ in range(HEADS)])
    attend = kernel.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    x = jax.ShapeDtypeStruct((HEADS, length, DIM), jnp.bfloat16)
    return attend, (x, x, x)


def visits(tiles) -> tuple[int, int]:
    """Chunks of keys that all blocks of queries visit, in one head: without a mask, and with one."""
    clear = masked = 0
    for first in range(0, tiles.queries, tiles.tokens):
        without = (first + 1) // tiles.chunk
        clear, masked = clear + without, masked - (-(first + tiles.tokens) // tiles.chunk) - without
    return clear, masked


def our_loops(chip: str, length: int, backward: bool, regions: list[int]) -> int:
    """Bundles of all runs of our inner loops."""
    import dataclasses

    from qwen_jax.kernels.blocks import tuned
    from qwen_jax.kernels.tiles import cut

    sizes = dataclasses.asdict(tuned(chip, head_dim=DIM, itemsize=2))
    prefix = "backward_" if backward else ""
    names = ("block_q", "block_kv", "block_kv_compute")
    clear, masked = visits(cut(queries=length, keys=length, group=1, **{n: sizes[prefix + n] for n in names}))
    return HEADS * (masked * regions[0] + clear * regions[1])


def splash_loops(length: int, regions: list[int]) -> int:
    rows = range(length // BLOCK_Q)
    return HEADS * regions[0] * sum(-(-(row + 1) * BLOCK_Q // BLOCK_KV) for row in rows)


def regions_of(path: str) -> list[int]:
    """Lengths of the straight pieces of a kernel in bundles, the longest first."""
    lines = [line for line in open(path) if re.match(r"^ *(0x[0-9a-f]+|0) +", line)]
    starts, found = {}, []
    for number, line in enumerate(lines):
        for edge, name in re.findall(r"(Start|End) region (\d+)", line):
            if edge == "Start":
                starts[name] = number
            elif name in starts:
                found.append((starts.pop(name), number + 1))
    length = lambda region: region[1] - region[0]
    inside = lambda x, y: y[0] <= x[0] and x[1] <= y[1] and x != y
    found = sorted(set(found), key=length, reverse=True)
    return [length(y) for y in found if not any(inside(x, y) and length(x) > length(y) / 10 for x in found)]


def scoped_vmem(folder: str) -> int:
    """The largest VMEM of any kernel of the program, in bytes."""
    sizes = [0]
    for path in glob.glob(f"{folder}/llo/*vmem_report.html"):
        text = open(path).read()
        report, _ = json.JSONDecoder().raw_decode(text[text.index("const DATA =") + 12 :].lstrip())
        for name, kernel in report["hlo_breakdowns"].items():
            if "attention" in name or "splash" in name:
                sizes.append(sum(block["block_size"] for block in kernel["blocks"] if block["block_type"] == "SCOPED"))
    return max(sizes)


def measure(folder: str, side: str, chip: str, mode: str, length: int) -> dict[str, float]:
    """In a child process whose compiler writes to `folder`: compiles one side and reads what was written."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    attend, inputs = ours(chip, length) if side == "ours" else splash(length, fused=side == "splash")
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())) for x in inputs]
    summed = lambda *inputs: attend(*inputs).astype(jnp.float32).sum()
    program = jax.jit(attend if mode == "forward" else jax.grad(summed, argnums=(0, 1, 2)))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Splash asks for the kind of device.
        memory = program.lower(*inputs).compile().memory_analysis()
    cycles, bundles = 0, 0
    for path in glob.glob(f"{folder}/profile/*.textproto"):
        if "flash" in path or "splash" in path:
            cycles += sum(map(int, re.findall(r"estimated_cycles: (\d+)", open(path).read())))
    for path in glob.glob(f"{folder}/llo/*-final_bundles.txt"):
        name = os.path.basename(path)
        backward = re.search(r"backward|dkv|_dq", name)
        if "analysis" in name or not re.search("flash|splash", name) or (mode == "backward") != bool(backward):
            continue
        regions = regions_of(path)
        bundles += our_loops(chip, length, bool(backward), regions) if side == "ours" else splash_loops(length, regions)
    return dict(
        cycles=cycles, bundles=bundles, vmem=scoped_vmem(folder) / MIB, temporaries=memory.temp_size_in_bytes / MIB
    )


def in_child(side: str, chip: str, mode: str, length: int) -> dict[str, float]:
    """`measure` in a process of its own: the compiler reads its options once, and aborts on a failed check."""
    print(f"{chip} {mode} {length}: {side} …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"--xla_jf_dump_to={folder}/llo",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=final_bundles|.*bundle-profile.*",
        ]
        # The profiler follows every step of the grid: forward at one length is what it finishes in minutes.
        if mode == "forward" and length == 4096:
            options.append(f"--xla_jf_dump_static_llo_profile_to={folder}/profile")
        env = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": " ".join(options)}
        call = [sys.executable, __file__, "--measure", folder, side, chip, mode, str(length)]
        done = subprocess.run(call, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bar(name: str, ratio: float, goal: float) -> bool:
    print(f"BAR {name} {ratio:.3f} <={goal:.2f} {'ok' if ratio <= goal else 'short'}")
    return ratio <= goal


def main(chips: list[str]) -> int:
    print("Estimates of the TPU compiler; nothing ran on a TPU.\n")
    columns = ("cycles", "microseconds", "bundles", "VMEM MiB", "temp. MiB")
    print("chip  pass      length  side".ljust(40), *(column.rjust(13) for column in columns))
    rows = {}
    for chip in chips:
        for mode, length in [(m, n) for m in ("forward", "backward") for n in (4096, 32768)]:
            for side in SIDES[: 2 if mode == "forward" else 3]:
                row = rows[chip, mode, length, side] = in_child(side, chip, mode, length)
                cells = [
                    f"{row['cycles']:.0f}",
                    f"{row['cycles'] / GIGAHERTZ[chip] / 1e3:.1f}",
                    f"{row['bundles']:.0f}",
                ]
                cells += [f"{row['vmem']:.2f}", f"{row['temporaries']:.1f}"]
                print(f"{chip:5} {mode:9} {length:<7} {side:15}", *(cell.rjust(13) for cell in cells), flush=True)
    print(
        "\ncycles, microseconds: static profile; bundles: of all runs of the inner loops; VMEM: of the largest kernel;"
    )
    print("temp.: HBM beside inputs and results, for backward of the whole gradient\n")
    reached = True
    for chip in chips:
        for mode, length in [(m, n) for m in ("forward", "backward") for n in (4096, 32768)]:
            row = rows[chip, mode, length, "ours"]
            for side in SIDES[1 : 2 if mode == "forward" else 3]:
                peer, name = rows[chip, mode, length, side], f"{chip}-{mode}-{length}-{side.replace(' ', '-')}"
                if row["cycles"]:
                    reached &= bar(f"{name}-cycles", row["cycles"] / peer["cycles"], forward_bar(chip))
                reached &= bar(f"{name}-bundles", row["bundles"] / peer["bundles"], 1)
                reached &= bar(f"{name}-vmem", row["vmem"] / peer["vmem"], 1)
                reached &= bar(f"{name}-temporaries", row["temporaries"] / peer["temporaries"], 1)
    return 0 if reached else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:6], int(sys.argv[6]))))
    else:
        sys.exit(main(sys.argv[1:] or list(TOPOLOGIES)))

"""What to change when a run does not fit."""

from __future__ import annotations

import math

from train.config import TrainConfig
from train.plan import formulas
from train.plan.candidates import candidates, settings
from train.plan.chips import GIB
from train.plan.compiled import Compiled
from train.plan.topology import Topology

_MOST = 2


def to_fit(config: TrainConfig, topology: Topology, compiled: Compiled, prefix: str) -> list[str]:
    """Lines that say what would make a step fit that does not; none for one that does.

    `prefix` is that of `candidates.settings`.
    """
    if compiled.program is not None:
        return []
    # What the formula leaves out is taken to grow and shrink with what it knows.
    scale = compiled.peak / formulas.train_bytes(config)
    needed = {candidate: scale * formulas.train_bytes(candidate) for candidate in candidates(config, topology)}
    fitting = [candidate for candidate, size in needed.items() if size <= topology.hbm]
    over = f"{(compiled.peak - topology.hbm) / GIB:.2f} GiB too much per device"
    if not fitting:
        chips = math.ceil(topology.num_chips * min(needed.values()) / topology.hbm)
        return [f"{over}, and no layout of this batch would fit by formula: it takes about {chips} chips"]
    lines = [f"{over}; by formula these would fit, best first (--search tries them):"]
    for candidate in fitting[:_MOST]:
        lines.append(f"  --set {settings(candidate, config, prefix)}   about {needed[candidate] / GIB:.1f} GiB")
    return lines

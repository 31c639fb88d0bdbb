"""How a run is asked to stop: SIGTERM and SIGINT, heard at the next step boundary, by every host at the same one."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import INTERRUPTED, SAVED_PLEASE_RESTART
from qwen_jax.sharding import AXES


class Stop:
    """Hears SIGTERM (exit code 75) and SIGINT (130) while used as a context manager.

    A signal only leaves a note; the loop asks for it at each step boundary, saves, and leaves. SIGTERM may come any
    number of times. After one SIGINT the next is left to the system, which ends the process at once, even inside a
    compilation: the step in flight is lost, and the checkpoints before it are whole.

    Attributes:
      asked: the exit code that this process is asked for; 0 for none. Other hosts may not have been.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._agreement: jax.Array | None = None

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.asked = max(self.asked, INTERRUPTED if number == signal.SIGINT else SAVED_PLEASE_RESTART)

    def exit_code(self) -> int:
        """0 to go on, else the exit code to leave with. Every host calls this at each step boundary, under the mesh.

        With several hosts the answer is the largest of what each had been asked when it called this *the time before*:
        the exchange is launched behind the step in flight and read one step later, so it never waits.
        """
        if jax.process_count() == 1:
            return self.asked
        agreed = 0 if self._agreement is None else int(self._agreement)
        sharding = NamedSharding(jax.sharding.get_mesh(), P(AXES))
        mine = np.full(jax.local_device_count(), self.asked, np.int32)
        self._agreement = jax.jit(jnp.max)(jax.make_array_from_process_local_data(sharding, mine))
        return agreed

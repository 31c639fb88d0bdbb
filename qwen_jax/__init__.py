"""Qwen in JAX: the library. It knows nothing of runs, servers or command lines.

config      what a Qwen is           zoo        every published size
sharding    mesh axes and letters    bindings   gin-like text to dataclasses
model       the forward pass         ops        its mathematics
engine      decoding                 text       text to ids and back
weights     checkpoints              errors     what a user can do wrong, and the exit codes
"""

__version__ = "0.1.0"

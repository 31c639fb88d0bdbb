"""Weights on disk. `checkpoint` keeps the state of a run; import it by name, since it brings Orbax along."""

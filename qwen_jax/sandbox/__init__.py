"""Untrusted Python, run where it can do no harm; docs/sandbox.md says what that means.

run        a program, once              session   an interpreter that keeps its variables between cells
grade      does a program pass its tests, without being able to pretend
problem    program and tests, as answers and rows have them
verify     what programs that judge answers say of them
isolation  what a program sees of the machine, and whether the machine can hide the rest
seccomp    which system calls it is refused
warden     the process that starts it, watches it and ends it; `namespaces` is how it is locked in
"""

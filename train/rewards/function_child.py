"""The process that a reward function lives in: reads calls as lines of JSON from a socket, and answers each.

Run as a script, with the socket's descriptor, the file and the name of the function. It imports nothing of ours: the
first place that modules are looked for is the folder of the file.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
import traceback

_LONGEST = 300  # characters of what is said of a fault


def load(path, name):
    """The function. LookupError where the file has none of that name."""
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    spec = importlib.util.spec_from_file_location("reward_function", path)
    assert spec and spec.loader
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise LookupError(f"it has no function {name}")
    return function


def answer(function, call):
    """What the function gives for each completion: a number, or in words why there is none."""
    found = function(prompts=call["prompts"], completions=call["completions"], **call["columns"])
    count = len(call["completions"])
    if not isinstance(found, list | tuple):
        return {"fault": "gave no list", "detail": f"it gave a {type(found).__name__}, no list"}
    if len(found) != count:
        return {"fault": "gave a list of another length", "detail": f"it gave {len(found)} rewards for {count}"}
    return {"rewards": [number(value) for value in found]}


def number(value):
    if value is None:
        return "gave None"
    if not hasattr(type(value), "__float__"):  # text has none
        return f"gave a {type(value).__name__}, no number"
    try:
        value = float(value)
    except Exception as error:
        return f"gave what is no number ({type(error).__name__})"
    return value if math.isfinite(value) else "gave nan" if math.isnan(value) else "gave an infinite number"


def attempt(function, *arguments):
    """What a function gives, or what it raises: its kind, and the last line of the traceback."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        line = " ".join(traceback.format_exception_only(error)[-1].split())
        return {"fault": f"raised {type(error).__name__}", "detail": line[:_LONGEST]}


def listen(connection, calls):
    """Passes calls on, also while one is being answered: when nobody is there any more, all that runs here ends."""
    for line in connection.makefile("rb"):
        calls.put(line)
    os.killpg(0, signal.SIGKILL)


def main():
    descriptor, path, name = sys.argv[1:]
    connection = socket.socket(fileno=int(descriptor))
    connection.set_inheritable(False)
    say = lambda message: connection.sendall(json.dumps(message).encode() + b"\n")
    calls = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, calls), daemon=True).start()
    function = attempt(load, path, name)
    say(function if isinstance(function, dict) else {})
    while True:
        say(attempt(answer, function, json.loads(calls.get())))


if __name__ == "__main__":
    main()

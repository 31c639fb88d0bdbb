"""Programs that behave, and programs that do what they can not to."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen_jax.errors import ConfigError, DataError, SandboxError
from qwen_jax.sandbox import process, view
from qwen_jax.sandbox.process import Limits, Warden
from qwen_jax.sandbox.run import run
from tests.sandbox.conftest import wait_for

ROOT = Path(__file__).parents[2]
SHORT = Limits(wall_seconds=0.4)
SMALL = Limits(memory_bytes=256 << 20, processes=16, file_bytes=1 << 20, output_bytes=10_000)


def told(program: str, **options):
    """What a program prints as JSON."""
    result = run(program, **options)
    assert result.reason == "ok", result
    return json.loads(result.stdout)


def test_a_program_runs_with_its_input_and_files():
    program = "import sys, data.words\nprint(input(), data.words.x, 6 * 7)\nsys.stderr.write('é')\nexit(3)"
    result = run(program, stdin="in", files={"data/words.py": "x = 'there'"})
    assert (result.stdout, result.stderr, result.exit_code, result.reason) == ("in there 42\n", "é", 3, "error")
    assert run(["python", "-c", "print(1)"]).stdout == "1\n"
    missing = run(["no-such-program"])
    assert missing.exit_code == 127 and "cannot run no-such-program" in missing.stderr


def test_packages_are_there_and_read_only():
    result = run("import numpy\nprint(int(numpy.ones(3).sum()))\nopen(numpy.__file__, 'a')")
    assert result.stdout == "3\n" and result.stderr.startswith("Traceback")


def test_what_ended_it():
    assert run("import os\nos.abort()").reason == "killed"
    assert run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)").exit_code == -signal.SIGKILL
    assert run("raise ValueError('é')").stderr.endswith("ValueError: é\n")
    assert run("import os\nos.write(1, b'\\xff')").stdout == "�"


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(99)", "9**9**9", "str(9**10**7)"])
def test_time_is_limited(program):
    assert run(program, limits=SHORT).reason == "timeout"


@pytest.mark.parametrize("program", [
    "import os\nos.fork()\nos.fork()\nfor i in range(10**7): pass",
    "import os\nfor i in range(60):\n    if os.fork() == 0: break\n    os.wait()\nfor i in range(10**6): pass",
])  # fmt: skip
def test_processor_time_of_the_whole_tree_is_limited(program):
    assert run(program, limits=Limits(wall_seconds=60, cpu_seconds=0.4)).reason == "timeout"


@pytest.mark.parametrize(
    ("program", "reason", "words"),
    [
        ("while True: print('x' * 99)", "output", ""),
        ("import sys\nwhile True: sys.stderr.write('x' * 99)", "output", ""),
        ("x = bytearray(10 << 30)", "memory", "MemoryError"),
        ("import mmap\nx = mmap.mmap(-1, 200 << 20)\nx.write(bytes(100 << 20))\nimport os\nos.fork()\nos.fork()\n"
         "y = bytes(100 << 20)\nimport time\ntime.sleep(99)", "memory", ""),
        ("import os, time\nfor i in range(3): os.fork()\nx = b'x' * (99 << 20)\ntime.sleep(99)", "memory", ""),
        ("f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 16))", "error", "OSError"),
        ("for i in range(99): open(str(i), 'wb').write(bytes(1 << 16))", "error", "No space left"),
        ("for i in range(10**5): open(str(i), 'wb')", "error", "No space left"),
        ("x = []\nwhile True: x.append(open('/dev/null'))", "error", "Too many open files"),
        ("import threading as t, time\nfor i in range(10**5): t.Thread(target=time.sleep, args=[9], daemon=1).start()",
         "error", "can't start new thread"),
        ("import os\ntry:\n    while True: os.fork()\nexcept OSError as e:\n    print(e)\n    while True: pass",
         "timeout", ""),
    ],
)  # fmt: skip
def test_greed_is_stopped(program, reason, words):
    result = run(program, limits=Limits(**{**vars(SMALL), "wall_seconds": 0.5 if reason == "timeout" else 20}))
    assert (result.reason, words in result.stderr) == (reason, True), result
    assert len(result.stdout) + len(result.stderr) <= SMALL.output_bytes
    assert run("print('next')").stdout == "next\n"


def test_a_fork_bomb_gets_the_processes_it_may_have():
    program = "import os, time\nn = 0\ntry:\n    while os.fork(): n += 1\n    time.sleep(99)\nexcept OSError: print(n)"
    assert int(run(program, limits=SMALL).stdout) == SMALL.processes - 1  # itself is one


def test_daemons_end_with_the_program(traces):
    program = (
        "import os, time\nif os.fork():\n    os.wait()\n    print('gone')\nelse:\n    os.setsid()\n"
        "    if os.fork() == 0:\n        os.setsid()\n        time.sleep(99)\n    os._exit(0)"
    )
    result = run(["python", f"{traces.word}.py"], files={f"{traces.word}.py": program})
    assert (result.stdout, result.reason) == ("gone\n", "ok")
    assert not traces.processes()


def test_files_of_the_machine_are_invisible(tmp_path):
    (tmp_path / "checkpoint").write_text("weights")
    paths = [
        str(tmp_path / "checkpoint"),
        str(ROOT / "setup.cfg"),
        __file__,
        "/proc/1/environ",
        "/proc/self/mem",
        "/sys",
        "/var",
    ]
    paths += ["/etc/passwd", "/etc/shadow", "/etc/hosts", "/bin/sh", "/usr/bin/env", "/run", "/boot", "/dev/tty"]
    shown = view.view(warden=False)
    for path in (*Path.home().iterdir(), Path.home() / ".cache/huggingface/token"):
        if not any(Path(other).is_relative_to(path) for other in shown["directories"] + shown["files"]):
            paths.append(str(path))
    assert len(paths) > 15
    assert told(f"import json, os\nprint(json.dumps([p for p in {paths!r} if os.path.exists(p)]))") == []
    assert told("import json, os\nprint(json.dumps(os.listdir(os.path.expanduser('~'))))")[0] == "main.py"


def test_nothing_is_written_but_in_the_folder(tmp_path):
    program = """
import json, os, shutil
written = []
def attempt(path):
    try:
        open(path, "a").close()
        written.append(path)
    except OSError:
        pass
for folder, folders, files in os.walk("/"):
    folders[:] = [] if folder.count("/") > 3 else [name for name in folders if os.path.join(folder, name) != "/tmp"]
    attempt(os.path.join(folder, "new"))
    for name in files[:3]:
        attempt(os.path.join(folder, name))
os.symlink("/usr/lib", "link")
attempt("link/new")
os.symlink("/etc/new", "file")
attempt("file")
attempt("../new")
try:
    os.link("/python/pyvenv.cfg", "hard")
    written.append("hard")
except OSError:
    pass
shutil.rmtree("/tmp", ignore_errors=True)
shutil.rmtree("/usr/lib", ignore_errors=True)
os.mkdir("/tmp/again")
print(json.dumps([path for path in written if not path.startswith("/dev/")]))
"""
    assert told(program) == []
    assert Path("/usr/lib").is_dir() and not Path("/tmp/again").exists()


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + (name := f"sandbox-{os.getpid()}"))
        local.listen()
        program = f"""
import json, socket
def attempt(function):
    try:
        function()
        return "reached"
    except OSError as error:
        return type(error).__name__
print(json.dumps([
    attempt(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}))),
    attempt(lambda: socket.create_connection(("169.254.169.254", 80))),
    attempt(lambda: socket.getaddrinfo("example.com", 80)),
    attempt(lambda: socket.socket(socket.AF_NETLINK)),
    attempt(lambda: socket.socket(socket.AF_UNIX).connect("\\0{name}")),
    attempt(lambda: socket.socketpair()),
]))
"""
        refused, refused_too, unknown, netlink, unreachable, pair = told(program)
    assert {refused, refused_too, netlink} == {"PermissionError"} and unknown == "gaierror"
    assert (unreachable, pair) == ("ConnectionRefusedError", "reached")


def test_other_processes_are_out_of_reach():
    program = """
import json, os, signal
for target in (0, -1, 1, 2, os.getppid(), -os.getpgid(0)):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        os.kill(target, signal.SIGTERM)
    except OSError:
        pass
os.kill(1, signal.SIGKILL)
os.kill(1, signal.SIGSTOP)
print(json.dumps([os.getpid(), os.getppid(), os.getuid()]))
"""
    assert told(program) == [2, 1, 1000]


def test_the_kernel_is_asked_in_vain():
    program = """
import ctypes, json, platform
numbers = {
    "x86_64": dict(ptrace=101, process_vm_readv=310, mount=165, umount2=166, pivot_root=155, unshare=272, setns=308,
        bpf=321, keyctl=250, perf_event_open=298, io_uring_setup=425, userfaultfd=323, memfd_create=319, clone=56,
        clone3=435),
    "aarch64": dict(ptrace=117, process_vm_readv=270, mount=40, umount2=39, pivot_root=41, unshare=97, setns=268,
        bpf=280, keyctl=219, perf_event_open=241, io_uring_setup=425, userfaultfd=282, memfd_create=279, clone=220,
        clone3=435),
}[platform.machine()]
libc = ctypes.CDLL(None, use_errno=True)
answers = {}
for name, number in numbers.items():
    first = ctypes.c_long(0x10000000 | 17 if name in ("unshare", "clone") else 0)
    answers[name] = [libc.syscall(number, first, 0, 0, 0, 0, 0), ctypes.get_errno()]
print(json.dumps(answers))
"""
    answers = told(program)
    assert answers.pop("clone3") == [-1, 38]  # ENOSYS, at which the C library makes threads with clone
    assert all(answer == [-1, 1] for answer in answers.values()), answers  # EPERM


def test_the_environment_tells_nothing(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-1")
    monkeypatch.setenv("WANDB_API_KEY", "secret-2")
    environment = told("import json, os\nprint(json.dumps(dict(os.environ)))")
    assert not {"HF_TOKEN", "WANDB_API_KEY", "USER"} & environment.keys() and "secret" not in str(environment)
    assert told("import json, os, stat\nfound = []\nfor i in range(256):\n    try: os.fstat(i), found.append(i)\n    "
                "except OSError: pass\nprint(json.dumps(found))") == [0, 1, 2, 3, 4]  # fmt: skip
    assert str(Path.home()) not in str([environment[name] for name in ("HOME", "PATH", "TMPDIR")])


@pytest.mark.parametrize(
    "program", ["print(1)\0", "\ud800", "x = '" + "é" * (1 << 24), "(" * 10**5, "# coding: nothing"]
)
def test_text_that_is_no_program_is_an_error(program):
    result = run(program, limits=Limits(file_bytes=1 << 20))
    assert (result.reason, result.stdout) == ("error", "") and result.stderr


def test_requests_that_mean_nothing_are_refused():
    for path in ("../x", "/x", "a/../../x", "", "a\0b"):
        with pytest.raises(DataError, match="path within"):
            run("", files={path: "x"})
    with pytest.raises(ConfigError, match="wall_seconds is 0"):
        Limits(wall_seconds=0)


def test_many_runs_leave_nothing(traces, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors = set(os.listdir("/proc/self/fd"))
    files = {f"{traces.word}.py": "import os\nos.fork()\nprint(input())"}
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda i: run(["python", *files], stdin=f"{i}", files=files), range(24))
        assert [result.stdout.split()[:1] for result in results] == [[f"{i}"] for i in range(24)]
    assert not traces.processes()
    assert set(os.listdir("/proc/self/fd")) <= descriptors
    assert not list(tmp_path.iterdir())
    assert not children_of_ours()


def children_of_ours() -> list[str]:
    """Wardens that nobody has waited for."""
    found = []
    for task in os.listdir("/proc/self/task"):
        # Threads of other tests, and their children, may end while we look.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in Path(f"/proc/self/task/{task}/children").read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if b"qwen_jax.sandbox" in (command := Path(f"/proc/{child}/cmdline")).read_bytes():
                        found.append(command)
    return found


def test_a_program_dies_with_its_warden(traces, isolation):
    sleep = f"import time\nprint({traces.word!r})\ntime.sleep(99)"
    with Warden(["python", "-c", sleep], isolation=isolation, limits=Limits()) as warden:
        assert wait_for(traces.processes)
        assert os.getsid(warden._process.pid) != os.getsid(0)  # Ctrl-C is not for it
        os.kill(warden._process.pid, signal.SIGKILL)
        with pytest.raises(SandboxError, match="process died"):
            warden.receive()
        assert traces.vanish()


def test_a_program_dies_with_us(traces):
    command = (
        f"from qwen_jax.sandbox.run import run; run(['python', '-c', 'import time; time.sleep(99)', {traces.word!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", command], cwd=ROOT) as parent:
        assert wait_for(lambda: len(traces.processes()) > 1)  # the parent is one
        parent.kill()
    assert traces.vanish()


def test_without_isolation_nothing_runs(monkeypatch):
    monkeypatch.setattr(process, "_probe", lambda: ("none", "unshare: Operation not permitted"))
    with pytest.raises(SandboxError, match="unshare: .*--allow-weak-sandbox") as error:
        run("print(1)")
    assert error.value.exit_code == 4


def test_a_kernel_that_refuses_namespaces_is_noticed():
    program = """
from qwen_jax.errors import SandboxError
from qwen_jax.sandbox import namespaces, seccomp
from qwen_jax.sandbox.run import run
seccomp._CALLS = {name: seccomp._CALLS[name] for name in ("unshare", "pivot_root")}
namespaces.filter_calls(seccomp.filter_program(unix_sockets=True))
try:
    run("print(1)")
except SandboxError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "namespaces: " in done.stdout and "unshare" in done.stdout and "not permitted" in done.stdout, done


UNPRIVILEGED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from qwen_jax.sandbox import process, view
from qwen_jax.sandbox.process import Limits
from qwen_jax.sandbox.run import run
fork = "import os, time\\nn = 0\\ntry:\\n  while os.fork(): n += 1\\n  time.sleep(99)\\nexcept OSError: print(n)"
view._LIBRARIES += (sys.argv[3],)
look = f"import os, socket\\nprint(os.listdir('/'), os.getuid())\\ntry: open('{sys.argv[3]}/own', 'a')\\n"
look += "except OSError as error: print(error)\\nsocket.socket()"
says = [process.isolate(allow_weak=True)]
for isolation in ["namespaces", *(["bubblewrap"] if sys.argv[2] else []), "none"]:
    process._probe = lambda: (isolation, "")
    result = run(look, allow_weak=True)
    forks = run(fork, limits=Limits(processes=9), allow_weak=True).stdout
    says.append([isolation, result.stdout, result.stderr[-50:], forks])
print(json.dumps(says))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests are without privileges already")
def test_without_privileges_it_is_the_same():
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    bubblewrap = shutil.which("bwrap") or ""
    if python is None or subprocess.run([python, "-c", "import sys; assert sys.version_info >= (3, 11)"]).returncode:
        pytest.skip("needs a Python 3.11 that any user may run")
    if not os.stat(ROOT).st_mode & 1:
        pytest.skip("needs a checkout that any user may read")
    own = Path(tempfile.mkdtemp())
    os.chown(own, 65534, 65534)
    (own / "own").write_text("")
    os.chown(own / "own", 65534, 65534)
    done = subprocess.run(
        [python, "-B", "-c", UNPRIVILEGED, str(ROOT), bubblewrap, str(own)],
        user=65534, group=65534, extra_groups=[], cwd="/", env={"PATH": os.environ["PATH"]},
        capture_output=True, text=True,
    )  # fmt: skip
    shutil.rmtree(own)
    assert done.returncode == 0, done.stderr
    best, *says = json.loads(done.stdout)
    assert best == "namespaces"
    for isolation, listing, error, forks in says:
        assert ("proc" in listing) == (isolation == "none")
        assert "Operation not permitted" in error
        assert ("Read-only file system" in listing) == (isolation != "none")
        # One process of bubblewrap's own does not count; without isolation, all of the user's do.
        assert forks in {"namespaces": ["8\n"], "bubblewrap": ["8\n", "9\n"], "none": [forks]}[isolation]

"""How the warden's child locks itself in: the system calls that do it, in the order in which they are possible.

Imported by the warden, a bare interpreter that has to start fast: nothing of ours in here, and little of Python's.
"""

from __future__ import annotations

import ctypes
import os
import resource

_NOBODY = 65534
_USER = 1000  # who the program believes it is
_ROOT_DIRECTORY = "/proc"  # a directory that every machine has, to build the new root over
_MAX_FILES = 10_000

_CLONE_NEWNS = 0x20000
_CLONE_NEWUSER = 0x10000000
_CLONE_APART = 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000  # pid, net, ipc, uts, cgroup
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 2, 4, 0x1000, 0x4000, 0x40000, 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _AT_RECURSIVE, _AT_FDCWD = 1, 2, 4, 0x8000, -100
_SYS_MOUNT_SETATTR = 442
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)


def enter(view: dict, file_bytes: int) -> None:
    """Moves this process, and more so the next that it forks, to where nothing is but what `view` shows.

    Raises OSError, whose first words are the step that the machine refuses.
    """
    proc = os.open(f"/proc/{os.getpid()}", os.O_PATH | os.O_DIRECTORY)
    if os.geteuid() == 0:
        # The mounts while we are root, who can read an interpreter in /root; then nobody, whom the limit on processes
        # holds, unlike root.
        _call("unshare", _CLONE_NEWNS)
        _show(view, file_bytes, _NOBODY)
        become_nobody()
        _call("unshare", _CLONE_NEWUSER | _CLONE_APART)
        _map_user(proc, _NOBODY, _NOBODY)
    else:
        uid, gid = os.geteuid(), os.getegid()
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_APART)
        _map_user(proc, uid, gid)
        _show(view, file_bytes, _USER)
    os.close(proc)


def bubblewrap_options(view: dict, file_bytes: int) -> list:
    """What has bubblewrap do what `enter` does."""
    options = ["--unshare-all", "--unshare-user", "--as-pid-1", "--die-with-parent", "--clearenv"]
    options += ["--uid", f"{_USER}", "--gid", f"{_USER}", "--size", f"{file_bytes}", "--tmpfs", "/tmp"]
    for option, paths in (("--ro-bind", view["directories"] + view["files"]), ("--dev-bind", view["devices"])):
        for path in paths:
            options += [option, path, path]
    for path, target in view["links"].items():
        options += ["--symlink", target, path]
    for path, text in view["texts"].items():
        options += ["--ro-bind-data", f"{in_memory(text.encode())}", path]
    return [*options, "--remount-ro", "/", "--chdir", "/tmp"]


def in_memory(contents: bytes) -> int:
    """A file of `contents` that has no name, at its beginning; its descriptor survives exec."""
    descriptor = os.memfd_create("contents", 0)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(contents)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def become_nobody() -> None:
    """Gives up being root."""
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self would still be root's


def die_with_parent() -> None:
    _call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """Processes whose parents have died become children of this one."""
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def filter_calls(program: bytes) -> None:
    """Puts this process and its children under a filter of `seccomp`; nothing they run gains rights any more."""
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    instructions = ctypes.create_string_buffer(program, len(program))
    fprog = _Fprog(len(program) // 8, ctypes.addressof(instructions))
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0)


def limit(limits: dict) -> None:
    """Sets limits of `resource`, {number: value}, where they are not lower already."""
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


class _Fprog(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def _map_user(proc: int, uid: int, gid: int) -> None:
    """Gives this process, in its new user namespace, the one user that there is."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{_USER} {uid} 1"), ("gid_map", f"{_USER} {gid} 1")):
        file = os.open(name, os.O_WRONLY, dir_fd=proc)
        os.write(file, text.encode())
        os.close(file)


def _show(view: dict, file_bytes: int, owner: int) -> None:
    """Makes a root of empty directories, with `view` mounted in it and a work directory, and moves there."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", _ROOT_DIRECTORY, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.mkdir(f"{_ROOT_DIRECTORY}/tmp")
    options = f"size={file_bytes},nr_inodes={_MAX_FILES},mode=700,uid={owner}"
    _mount("tmpfs", f"{_ROOT_DIRECTORY}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    for path in view["directories"]:
        os.makedirs(_ROOT_DIRECTORY + path)
        _bind(path, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for path in view["files"] + view["devices"]:
        os.makedirs(os.path.dirname(_ROOT_DIRECTORY + path), exist_ok=True)
        os.close(os.open(_ROOT_DIRECTORY + path, os.O_CREAT | os.O_WRONLY))
        _bind(path, _ATTR_RDONLY | _ATTR_NOSUID | (0 if path in view["devices"] else _ATTR_NODEV))
    for path, target in view["links"].items():
        os.makedirs(os.path.dirname(_ROOT_DIRECTORY + path), exist_ok=True)
        os.symlink(target, _ROOT_DIRECTORY + path)
    for path, text in view["texts"].items():
        with open(_ROOT_DIRECTORY + path, "w") as file:
            file.write(text)
    _set_attributes(_ROOT_DIRECTORY, _ATTR_RDONLY, 0)
    os.chdir(_ROOT_DIRECTORY)
    _call("syscall", view["pivot_root"], b".", b".")  # the old root lies over the new one now
    _call("umount2", b".", _MNT_DETACH)
    os.chdir("/tmp")


def _bind(path: str, attributes: int) -> None:
    _mount(path, _ROOT_DIRECTORY + path, None, _MS_BIND | _MS_REC)
    _set_attributes(_ROOT_DIRECTORY + path, attributes, _AT_RECURSIVE)


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    _call(
        "syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, ctypes.addressof(wanted), ctypes.sizeof(wanted)
    )


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, kind, options)]
    _call("mount", texts[0], target.encode(), texts[1], flags, texts[2])


def _call(name: str, *arguments: int | bytes | None) -> None:
    """Calls a function of the C library. Raises OSError if it fails."""
    values = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    if getattr(_libc, name)(*values) < 0:
        error = ctypes.get_errno()
        words = " ".join(os.fsdecode(value) for value in arguments if isinstance(value, bytes))
        raise OSError(error, f"{name} {words}: {os.strerror(error)}")

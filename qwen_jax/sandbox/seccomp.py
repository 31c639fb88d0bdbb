"""The system calls a program in the sandbox is refused, as a filter that the kernel runs (seccomp).

A list of what is refused, not of what is allowed: the namespaces hold without it, and it makes the kernel's surface
smaller. What is not listed is allowed, or Python's libraries would fail where a new kernel has a new call.
"""

from __future__ import annotations

import errno
import platform
import struct

from qwen_jax.errors import SandboxError

# By name: the number on x86_64 and on aarch64 (None where it does not exist), from the kernel's unistd.h.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # Looking into other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # Mounts and namespaces; clone with a namespace is refused below.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "unshare": (272, 97),
    "setns": (308, 268),
    # Parts of the kernel with a history.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    # Memory that no process is seen to have.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # The machine itself: root's, and refused to anybody else as it is.
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "fanotify_init": (300, 262),
    "syslog": (103, 116),
    "vhangup": (153, 58),
}
_SOCKET, _SOCKETPAIR, _CLONE, _CLONE3 = (41, 198), (53, 199), (56, 220), (435, 435)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
_FIRST_X32 = 0x40000000  # the other set of calls that an x86_64 kernel may have
_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET
_AF_UNIX = 1

# What the instructions of the filter see (struct seccomp_data), what they do (linux/bpf_common.h), and its verdicts.
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000


def call_number(name: str) -> int:
    """Number of a system call on this machine. Raises SandboxError on a processor that is not known here."""
    number = _CALLS[name][_architecture()[0]]
    assert number is not None
    return number


def filter_program(*, unix_sockets: bool) -> bytes:
    """The filter (an array of struct sock_filter): EPERM for what is listed, and for sockets of the network.

    Args:
      unix_sockets: whether sockets between processes are allowed; a pair that is made connected always is.
    """
    column, architecture = _architecture()
    refuse = _instruction(_RETURN, _FAIL | errno.EPERM)
    allow = _instruction(_RETURN, _ALLOW)
    kill = _instruction(_RETURN, _KILL)
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_IF_EQUAL, architecture, 1, 0),
        kill,
        _instruction(_LOAD, _NUMBER),
        _instruction(_IF_AT_LEAST, _FIRST_X32, 0, 1),
        kill,
    ]
    for numbers in _CALLS.values():
        if (number := numbers[column]) is not None:
            program += [_instruction(_IF_EQUAL, number, 0, 1), refuse]
    # The C library makes threads with clone where it is told that clone3, whose flags a filter cannot see, is unknown.
    program += [_instruction(_IF_EQUAL, _CLONE3[column], 0, 1), _instruction(_RETURN, _FAIL | errno.ENOSYS)]
    flags = [_instruction(_LOAD, _ARGUMENT), _instruction(_IF_ANY_BIT, _NAMESPACES, 0, 1), refuse, allow]
    local = [_instruction(_LOAD, _ARGUMENT), _instruction(_IF_EQUAL, _AF_UNIX, 1, 0), refuse, allow]
    for number, body in (
        (_CLONE[column], flags),
        (_SOCKETPAIR[column], local),
        (_SOCKET[column], local if unix_sockets else [refuse]),
    ):
        program += [_instruction(_IF_EQUAL, number, 0, len(body)), *body]
    return b"".join([*program, allow])


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, operand)


def _architecture() -> tuple[int, int]:
    if (machine := platform.machine()) not in _ARCHITECTURES:
        raise SandboxError(f"no list of system calls for a {machine} processor; want {' or '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[machine]

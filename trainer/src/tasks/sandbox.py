"""What a program that nobody trusts may ask of the kernel: to compute, to read files and to say how it went.

A filter over system calls (seccomp, Linux 3.5 and later). It needs no namespaces and no privileges, and cannot be
taken off. Calls that are not listed fail with EPERM: sockets, processes, signals to others, anything written to disk.
"""

import ctypes
import errno
import os
import platform
import signal
import struct
import sys

# name: numbers on x86_64 and aarch64 (None: it has no such call).
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "lseek": (8, 62), "getdents64": (217, 61), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "dup": (32, 23),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "futex": (202, 98), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179), "getrusage": (98, 165),
    "getrandom": (318, 278), "rseq": (334, 293), "set_robust_list": (273, 99), "membarrier": (324, 283),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# Allowed to read: name: (numbers, which argument has the flags).
OPENING = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# struct seccomp_data: number, architecture, instruction pointer, six arguments of 64 bits.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
# Instructions of the classic packet filter.
LOAD, IF_EQUAL, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
KILL, DENY, ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 1, 38, 22, 2


def instructions(machine):
    """The filter as (code, jump if true, jump if false, operand)."""
    column, architecture = ARCHITECTURES[machine]
    code = [(LOAD, 0, 0, ARCHITECTURE), (IF_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for numbers, argument in OPENING.values():
        if numbers[column] is not None:
            code += [
                (IF_EQUAL, 0, 4, numbers[column]),
                (LOAD, 0, 0, ARGUMENTS + 8 * argument),
                (IF_ANY_BIT, 0, 1, WRITING),
                (RETURN, 0, 0, DENY),
                (RETURN, 0, 0, ALLOW),
            ]
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            code += [(IF_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    return code + [(RETURN, 0, 0, DENY)]


def die_with_parent():
    """Sees to it that the kernel kills this process when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def confine():
    """Applies the filter to this process, for good. Elsewhere than on Linux there are only resource limits."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    code = b"".join(struct.pack("=HBBI", *each) for each in instructions(platform.machine()))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    zero, one = ctypes.c_ulong(0), ctypes.c_ulong(1)
    refused = libc.prctl(PR_SET_NO_NEW_PRIVS, one, zero, zero, zero)
    if refused or libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(FILTER), program, zero, zero):
        raise OSError(ctypes.get_errno(), "the sandbox for programs cannot be set up")

"""System calls that programs in the sandbox do without, as a seccomp filter.

Memory without a limit (memfd, System V's shared memory and queues), other processes' memory, and large parts of Linux
in which mistakes were found again and again. They look like calls that this Linux does not have.
"""

import errno
import platform
import struct

from k25_jax.sandbox.bubblewrap import SandboxError

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as Linux's audit names them
FORBIDDEN = {  # name -> its number in x86_64 and aarch64
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
_FOREIGN = 0x40000000  # from here on x86_64 has numbers of another convention


def syscall_filter() -> bytes:
    """The filter for this machine as a BPF program, for `bwrap --seccomp`."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise SandboxError(f"no filter of system calls is known for {machine}: use one of {', '.join(ARCHITECTURES)}")
    numbers = [pair[list(ARCHITECTURES).index(machine)] for pair in FORBIDDEN.values()]
    tests = [(_AT_LEAST, _FOREIGN), *((_EQUAL, number) for number in numbers)]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(test, len(tests) - i, 0, number) for i, (test, number) in enumerate(tests)]  # a hit goes to the end
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)

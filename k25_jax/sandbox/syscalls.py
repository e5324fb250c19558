"""System calls that programs in the sandbox do without, as a seccomp filter.

Memory that no limit counts (memfd, System V's and POSIX's shared memory, queues and semaphores, larger buffers of
sockets, huge pages of which a part stays), other processes' memory, and large parts of Linux in which mistakes were
found again and again. They look like calls that this Linux does not have.
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
    "shmctl": (31, 195),
    "shmat": (30, 196),
    "semget": (64, 190),
    "semctl": (66, 191),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "mq_open": (240, 180),
    "vmsplice": (278, 75),
    "io_setup": (206, 0),
    "fanotify_init": (300, 262),
    "landlock_create_ruleset": (444, 444),
    "process_madvise": (440, 440),
    "seccomp": (317, 277),
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
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALL = 0xFFFFFFFF
_SOCKET, _SOCKETPAIR, _SETSOCKOPT, _MMAP, _MADVISE, _PRCTL = (
    (41, 198),
    (53, 199),
    (54, 208),
    (9, 222),
    (28, 233),
    (157, 167),
)
FORBIDDEN_ARGUMENTS = [  # numbers of the call, then its argument, a mask, how to compare, and with what
    *((_SETSOCKOPT, ((1, _ALL, _EQUAL, 1), (2, _ALL, _EQUAL, option))) for option in (7, 8, 32, 33, 60)),  # buffers
    *((call, ((0, _ALL, _AT_LEAST, 17),)) for call in (_SOCKET, _SOCKETPAIR)),  # families besides unix, inet, netlink
    (_MMAP, ((3, 0x21, _EQUAL, 0x21),)),  # shared and anonymous: it stays when nobody has it mapped
    *((_MADVISE, ((2, _ALL, _EQUAL, advice),)) for advice in (14, 25)),  # huge pages
    (_PRCTL, ((0, _ALL, _EQUAL, 41), (1, _ALL, _EQUAL, 0))),  # the bootstrap has turned huge pages off
]
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
_FOREIGN = 0x40000000  # from here on x86_64 has numbers of another convention


def syscall_filter() -> bytes:
    """The filter for this machine as a BPF program, for `bwrap --seccomp`."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise SandboxError(f"no filter of system calls is known for {machine}: use one of {', '.join(ARCHITECTURES)}")
    column = list(ARCHITECTURES).index(machine)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL)]
    program += _rule([(0, _ALL, _AT_LEAST, _FOREIGN)])
    for numbers in FORBIDDEN.values():
        program += _rule([(0, _ALL, _EQUAL, numbers[column])])
    for numbers, arguments in FORBIDDEN_ARGUMENTS:
        tests = [(16 + 8 * place, mask, test, value) for place, mask, test, value in arguments]
        program += _rule([(0, _ALL, _EQUAL, numbers[column]), *tests])
    program += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _rule(tests: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Refuse a call for which all tests hold: the place of a word, a mask, how to compare, and with what."""
    program = []
    for place, mask, test, value in tests:
        program += [(_LOAD, 0, 0, place), (_AND, 0, 0, mask), (test, 0, None, value)]
    program.append((_RETURN, 0, 0, _ERROR | errno.ENOSYS))
    return [
        (code, yes, len(program) - i - 1 if no is None else no, value)
        for i, (code, yes, no, value) in enumerate(program)
    ]

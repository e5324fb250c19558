"""Functions that block, beside an event loop: each call has a thread, which is left behind when it does not come back."""

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable

from k25_jax.sandbox.observation import InfrastructureError

MOST_LEFT = 256  # threads that hang

_left: set[threading.Thread] = set()  # behind, and perhaps still running


class Late(Exception):
    """A call did not come back in time."""


async def in_thread(function: Callable, *arguments, seconds: float = math.inf):
    """What the function returns or raises. Late after `seconds`; then, or when cancelled, its thread is left behind.

    Such a thread holds up neither others nor the end of the program. InfrastructureError when MOST_LEFT of them hang.
    """
    _left.difference_update([thread for thread in _left if not thread.is_alive()])
    if len(_left) >= MOST_LEFT:
        raise InfrastructureError(f"{len(_left)} calls have not come back: what they wait for is broken")
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def work():
        result = error = None
        try:
            result = function(*arguments)
        except BaseException as problem:  # whatever it is, it is for the caller
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_settle, done, result, error)

    thread = threading.Thread(target=work, name=f"k25-{getattr(function, '__name__', 'call')}", daemon=True)
    thread.start()
    try:
        await asyncio.wait({done}, timeout=None if math.isinf(seconds) else seconds)
        if not done.done():
            raise Late
        return done.result()
    finally:
        if done.done():
            done.exception()  # if nobody waits for it any more, it is not to be complained of
        else:
            done.cancel()
            _left.add(thread)


def _settle(done: asyncio.Future, result, error: BaseException | None) -> None:
    if done.done():
        return
    if isinstance(error, StopIteration):  # which a future does not take
        error = RuntimeError(f"StopIteration: {error}")
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)

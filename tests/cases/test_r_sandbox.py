"""What a program in the sandbox makes this machine pay is bounded, and its outputs belong to the call that made them."""

import time

import pytest

from k25_jax.sandbox.kernel import Limits
from k25_jax.sandbox.sandbox import Sandbox

SECONDS = 2.0


@pytest.fixture(scope="module")
def box(bwrap):
    """With the limits that people get, as far as time is concerned."""
    with Sandbox(Limits(memory_mb=768, processes=40)) as sandbox:
        sandbox.run("import os, threading, time")
        yield sandbox


def spent(box, code, seconds=SECONDS):
    """What is seen, and the seconds that it took."""
    box.run("import os, threading, time")  # starts an interpreter where the last was lost
    began = time.monotonic()
    seen = box.run(code, seconds)
    return seen, time.monotonic() - began


SCANS = """
import io
from PIL import Image
from IPython.display import publish_display_data
file = io.BytesIO(); Image.new('RGB', ({0}, {0})).save(file, 'JPEG', progressive=True)
data = file.getvalue(); begin, end = data.rindex(b'\\xff\\xda'), data.rindex(b'\\xff\\xd9')
data = data[:end] + data[begin:end] * {1} + data[end:]
publish_display_data({{'image/jpeg': __import__('base64').b64encode(data).decode()}})
"""


@pytest.mark.parametrize("side, scans", [(1500, 1000), (4000, 100), (400, 8000)])
def test_images_that_take_long_to_decode(box, side, scans):
    seen, seconds = spent(box, SCANS.format(side, scans), 30.0)
    assert not seen.images and "an image cannot be shown" in seen.text and seconds < 31.0
    assert box.run("1 + 1").text == "2"


def test_an_ordinary_progressive_image_is_shown(box):
    seen, _ = spent(box, SCANS.format(300, 0), 30.0)
    assert seen.text == "[image 1]" and len(seen.images) == 1


def test_many_images_do_not_pass_the_deadline(box):
    image = "{'image/jpeg': __import__('base64').b64encode(data).decode()}"
    code = f"{SCANS.format(1000, 8)}for _ in range(100): publish_display_data({image})\n__import__('time').sleep(600)"
    seen, seconds = spent(box, code)
    assert seen.status == "deadline" and seconds < SECONDS + 2.0  # 1 is due; the machine may be busy


@pytest.mark.parametrize(
    "code",
    [
        "import ctypes; c = ctypes.CDLL(None); print({c.semget(0, 32000, 0o1600) for _ in range(1000)})",
        "import ctypes; c = ctypes.CDLL(None); print({c.shmget(0, 2**20, 0o1600), c.msgget(0, 0o1600)} - {-1} or {-1})",
        "import ctypes; c = ctypes.CDLL(None); print({c.mq_open(b'/q', 0o102, 0o600, None)})",
        "import socket\ntry: socket.socketpair()[0].setsockopt(1, socket.SO_SNDBUF, 2**22)\nexcept OSError: print({-1})",
        "import socket\ntry: socket.socketpair()[0].setsockopt(1, 33, 2**22)\nexcept OSError: print({-1})",
        "import ctypes; c = ctypes.CDLL(None); print({c.vmsplice(1, None, 0, 0), c.prctl(41, 0, 0, 0, 0)})",
        "import ctypes; m = ctypes.CDLL(None).mmap; m.restype = ctypes.c_ssize_t; print({m(None, 4096, 3, 0x21, -1, 0)})",
        "f = open('/dev/zero', 'r+b'); import mmap\ntry: mmap.mmap(f.fileno(), 4096)\nexcept OSError: print({-1})",
        "import socket\ntry: socket.socket(38, 5)\nexcept OSError: print({-1})",
    ],
)
def test_memory_that_nobody_counts_is_refused(box, code):
    assert box.run(code).text == "{-1}"


def test_shared_memory_is_there_within_its_limit(box):
    code = "import mmap, os\nm = mmap.mmap(-1, 13)\nif not os.fork(): m.write(b'Hello, world!'); os._exit(0)\nos.wait()\nm[:]"
    assert box.run(code).text == "b'Hello, world!'"
    assert "File too large" in box.run("mmap.mmap(-1, 2**29)").text
    code = "import multiprocessing as m\nv = m.Value('i', 1)\ndef f(): v.value = 7\n"
    code += "p = m.get_context('fork').Process(target=f); p.start(); p.join(); v.value"
    assert box.run(code).text == "7"


@pytest.mark.parametrize(
    "code",
    [
        "for i in range(10**7): os.close(os.open(f'/tmp/{i}', os.O_CREAT))",
        "os.chdir('/tmp')\nwhile True: os.mkdir('d' * 200); os.chdir('d' * 200)",
        "import socket, time\nkept = []\nfor i in range(99): kept.append(socket.create_server(('', 0)))\ntime.sleep(600)",
    ],
)
def test_what_linux_keeps_is_counted(bwrap, code):
    with Sandbox(Limits(memory_mb=300, processes=40)) as sandbox:
        seen = sandbox.run("import os\n" + code, 60.0)
        assert seen.status == "died" and "took more than 300 MB of memory" in seen.text
        assert sandbox.run("1 + 1").text == "2"


FORGE = """
kernel = get_ipython().kernel; parent = kernel.get_parent()
def forge(content):
    pack = kernel.session.pack
    kernel.session.pack = lambda x: content if isinstance(x, dict) and 'data' in x else pack(x)
    kernel.session.send(kernel.iopub_socket, 'display_data', {'data': {}}, parent=parent)
    kernel.session.pack = pack
"""


@pytest.mark.parametrize(
    "parts", ["b'{},' * 20_000_000", "b'{},' * 3_000_000", "b'1,' * 5_000_000", "b'[],\"\",' * 900_000"]
)
def test_messages_of_very_many_parts_are_not_parsed(box, parts):
    seen, _ = spent(box, FORGE + f"forge(b'{{\"data\": [' + {parts} + b'0]}}'); print('after')", 30.0)
    assert "or of very many parts is left out]" in seen.text and box.run("1 + 1").text == "2"


@pytest.mark.parametrize("size", [20, 50])
def test_a_value_that_is_too_large_does_not_cost_the_interpreter(box, size):
    seen, _ = spent(box, f"kept = {size}\n'x' * ({size} * 10**6)", 30.0)
    assert seen.status == "ok" and "MB or of very many parts is left out]" in seen.text
    assert box.run("kept").text == str(size)


# ------------------------------------------------------------------------------------- outputs belong to their call
LEFT_BEHIND = {
    "a thread that prints": "while True: print('forged'); time.sleep(0.01)",
    "a thread that displays": "while True: display('forged'); time.sleep(0.01)",
    "a thread that sends": "k = get_ipython().kernel\nwhile True:\n    time.sleep(0.01)\n"
    "    k.session.send(k.iopub_socket, 'stream', {'name': 'stdout', 'text': 'forged'}, parent=k.get_parent())",
    "a thread that clears": "from IPython.display import clear_output\nwhile True: clear_output(); time.sleep(0.01)",
    "a thread that writes errors": "import sys\nwhile True: print('forged', file=sys.stderr); time.sleep(0.01)",
}


def test_the_end_of_what_children_write_is_taken_once(box):
    """Several threads may read it, each before the first has closed the pipe."""
    code = "import os, sys\npipe = sys.stdout._pipe\nos.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n"
    assert box.run(code + "for _ in range(300): sys.stdout._take(pipe)").text == ""
    for _ in range(3):
        assert box.run("print('mine')\n2").text == "mine\n2"


@pytest.mark.parametrize("kind", LEFT_BEHIND)
def test_threads_left_behind_are_not_heard_later(box, kind):
    body = "".join(f"    {line}\n" for line in LEFT_BEHIND[kind].splitlines())
    box.run(f"def late():\n{body}threading.Thread(target=late, daemon=True).start()\ntime.sleep(0.2)")
    for _ in range(3):
        assert box.run("time.sleep(0.3); print('mine')\n2").text == "mine\n2"
    box.run("os._exit(0)")
    box.run("import os, threading, time")


@pytest.mark.parametrize(
    "start",
    [
        "threading.Timer(0.3, print, ['forged']).start()",
        "import _thread; _thread.start_new_thread(lambda: [time.sleep(0.3), print('forged')], ())",
        "import concurrent.futures as f; f.ThreadPoolExecutor().submit(lambda: [time.sleep(0.3), print('forged')]); None",
        "import asyncio\nasync def late(): await asyncio.sleep(0.3); print('forged')\nt = asyncio.ensure_future(late())",
        "if not os.fork():\n    time.sleep(0.3); print('forged', flush=True); time.sleep(0.2); os._exit(0)",
        "if not os.fork():\n    time.sleep(0.3); os.write(1, b'forged\\n'); os._exit(0)",
        "import subprocess; p = subprocess.Popen('sleep 0.3; echo forged; echo forged >&2', shell=True)",
        "import subprocess; p = subprocess.Popen('while true; do echo forged; done', shell=True, start_new_session=True)",
        "os.system('(sleep 0.3; echo forged) &'); None",
    ],
)
def test_what_comes_late_is_not_heard_later(box, start):
    box.run(start)
    assert box.run("time.sleep(0.7); print('mine')\n2").text == "mine\n2"
    assert box.run("os.system('echo child'); print('mine')").text == "child\nmine"


def test_a_pool_of_threads_speaks_for_whoever_asks(box):
    code = "import concurrent.futures as f\npool = f.ThreadPoolExecutor(1)\npool.submit(print, 'first').result()"
    assert box.run(code).text == "first" and box.run("pool.submit(print, 'second').result()").text == "second"


def test_an_end_that_is_forged_ends_nothing(box):
    code = "import time\nk = get_ipython().kernel\nk._publish_status('idle', 'shell'); time.sleep(0.5); print('late')"
    assert box.run(code).text == "late" and box.run("print('mine')").text == "mine"
    seen, seconds = spent(box, "while True: get_ipython().kernel._publish_status('idle', 'shell')")
    assert seen.status == "deadline" and seconds < SECONDS + 2.0
    assert box.run("print('mine')").text == "mine"

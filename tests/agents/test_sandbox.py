import io
import logging
import os
import tempfile
import threading

import numpy as np
import psutil
import pytest
from PIL import Image

from k25_jax.agents.bubblewrap import SandboxError
from k25_jax.agents.kernel import Limits
from k25_jax.agents.observation import Excerpt, InfrastructureError
from k25_jax.agents.sandbox import Sandbox
from k25_jax.vision.image import load_image

RED = np.full((6, 8, 3), (200, 0, 10), np.uint8)


def test_state_and_values_and_errors(sandbox):
    assert sandbox.run("a = 20\ndef f(x): return x + 1").text == ""
    assert sandbox.run("print('seen')\nf(a)").text == "seen\n21"
    failed = sandbox.run("f('x')")
    assert failed.status == "error" and 'can only concatenate str (not "int") to str' in failed.text
    assert "\x1b" not in failed.text
    assert sandbox.run("import os; os.system('echo of a child')").text == "of a child\n0"
    assert "invalid syntax" in sandbox.run("def").text
    assert sandbox.run("input()").status == "error"  # nobody is there to type


def test_the_packages_of_the_project_are_there(sandbox):
    code = "import numpy, scipy.linalg, PIL.Image\nfloat(scipy.linalg.det(numpy.eye(3)))"
    assert sandbox.run(code).text == "1.0"


def test_images_go_in_and_come_out(sandbox):
    sandbox.put("red.png", RED)
    seen = sandbox.run("from PIL import Image\nimage = Image.open('red.png')\nprint(image.getpixel((0, 0)))\nimage")
    assert seen.text == "(200, 0, 10)\n[image 1]"
    np.testing.assert_array_equal(load_image(seen.images[0]), RED)
    sandbox.run("image.transpose(Image.ROTATE_90).save('turned.png')")
    assert Image.open(io.BytesIO(sandbox.get("turned.png"))).size == (6, 8)
    drawn = sandbox.run("import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()")
    assert drawn.text == "[image 1]" and load_image(drawn.images[0]).ndim == 3
    many = sandbox.run("for _ in range(5): display(image)")
    assert len(many.images) == 3 and many.text.count("[an image is left out: 3 are the most]") == 2
    parts = seen.content()
    assert parts == [{"type": "text", "text": seen.text}, {"type": "image", "image": seen.images[0]}]


@pytest.mark.parametrize("data", ["bm90IGFuIGltYWdl", "x", "", 5])
def test_images_that_are_none(pool, data):
    with pool.sandbox() as sandbox:
        code = f"from IPython.display import publish_display_data\npublish_display_data({{'image/png': {data!r}}})"
        observation = sandbox.run(code)
        lost = data == 5
        assert observation.status == ("died" if lost else "ok") and not observation.images
        assert ("damaged messages" if lost else "[an image cannot be shown:") in observation.text


@pytest.mark.parametrize("name", ["", "a/b.png", "..", "/etc/x", ".hidden", "a\nb", "x" * 200])
def test_files_stay_in_the_working_folder(sandbox, name):
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        sandbox.put(name, b"x")


def test_a_file_that_does_not_fit_is_not_the_models_fault(pool):
    with pool.sandbox() as sandbox:
        with pytest.raises(SandboxError, match=r"large.bin \(25165824 bytes\) cannot be written .*(space|large)"):
            sandbox.put("large.bin", bytes(24 * 2**20))
        assert issubclass(SandboxError, InfrastructureError)


def test_after_its_death_it_starts_anew_and_says_so(pool):
    with pool.sandbox() as sandbox:
        sandbox.put("in.png", RED)
        sandbox.run("x = 1; open('made', 'w')")
        died = sandbox.run("print('last words', flush=True)\nimport os; os.kill(os.getpid(), 9)")
        assert died.status == "died" and "its process ended (killed by SIGKILL)" in died.text
        assert "A new one has no variables and only the files that were given at the start." in died.text
        assert "NameError" in sandbox.run("x").text and sandbox.run("import os; os.listdir()").text == "['in.png']"
        sandbox.run("import threading, time\nthreading.Timer(0.3, os._exit, [3]).start()")
        sandbox._kernel._process.wait(60)
        late = sandbox.run("print('not run')")
        assert late.status == "died" and "(exit code 3). This code was not run." in late.text
        assert sandbox.run("1 + 1").text == "2"


def test_the_pool_hands_out_fresh_kernels_to_threads(pool):
    """More threads than kernels; each has a namespace of its own, and outlives the thread that began it."""
    seen, sandboxes = [], []

    def use(number):
        with pool.sandbox() as sandbox:
            seen.append((sandbox.run("'x' in globals()").text, sandbox.run(f"x = {number}\nx").text))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    threads.append(threading.Thread(target=lambda: sandboxes.append(Sandbox(start=pool._take))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [("False", str(number)) for number in range(3)]
    with sandboxes[0] as sandbox:
        assert sandbox.run("1").text == "1"


def test_closing_leaves_nothing_behind(bwrap):
    def children():
        return {child.pid for child in psutil.Process().children(recursive=True)}

    before = (
        children(),
        set(os.listdir(tempfile.gettempdir())),
        set(os.listdir("/dev/shm")),
        len(os.listdir("/proc/self/fd")),
    )
    with Sandbox() as sandbox:
        sandbox.run("import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)")
        inside = children() - before[0]
    assert len(inside) >= 3  # bubblewrap, its first process, the kernel
    assert children() == before[0] and not any(psutil.pid_exists(pid) for pid in inside)
    assert set(os.listdir(tempfile.gettempdir())) == before[1] and set(os.listdir("/dev/shm")) == before[2]
    sandbox.close()  # again
    assert len(os.listdir("/proc/self/fd")) <= before[3]


def test_without_bubblewrap_it_refuses(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SandboxError, match=r"bubblewrap \(bwrap\) is not there.*apt install bubblewrap.*unconfined=True"
    ):
        Sandbox()


def test_bubblewrap_that_does_not_work_is_infrastructure(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InfrastructureError, match="bubblewrap did not start: no namespaces here"):
        Sandbox()


def test_unconfined_warns_and_cleans_up(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("K25_SECRET", "hunter2")
    with caplog.at_level(logging.WARNING), Sandbox(unconfined=True) as sandbox:
        sandbox.put("red.png", RED)
        code = "import os, subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
        code += "print(os.listdir(), 'K25_SECRET' in os.environ, child.pid)"
        text = sandbox.run(code).text
        assert text.startswith("['red.png'] False") and sandbox.get("red.png")[:4] == b"\x89PNG"
        child = int(text.split()[-1])
    assert any("UNCONFINED" in record.message and record.levelname == "WARNING" for record in caplog.records)
    assert os.listdir(tmp_path) == []
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("name", ["memory_mb", "processes", "stop_seconds", "images"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"Limits.{name}=0 must be positive"):
        Limits(**{name: 0})


@pytest.mark.parametrize("most", [1, 2, 7, 10])
@pytest.mark.parametrize("cuts", [[30], [1] * 30, [3, 0, 20, 7], [9], []])
def test_excerpts_keep_both_ends(most, cuts):
    text = "".join(chr(97 + i % 26) for i in range(sum(cuts)))
    excerpt, start = Excerpt(most), 0
    for cut in cuts:
        excerpt.add(text[start : start + cut])
        start += cut
    head, tail = most - most // 2, most // 2
    left_out = f"\n[.. {len(text) - most} characters left out ..]\n"
    shown = text if len(text) <= most else text[:head] + left_out + text[len(text) - tail :]
    assert str(excerpt) == shown

import io
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import runs
from k25_jax.sandbox.bubblewrap import SandboxError
from k25_jax.sandbox.observation import InfrastructureError
from k25_jax.sandbox.pool import KernelPool
from k25_jax.sandbox.sandbox import Sandbox
from k25_jax.vision.image import load_image

RED = np.full((6, 8, 3), (200, 0, 10), np.uint8)


def test_state_and_values_and_errors(sandbox):
    assert sandbox.run("a = 20\ndef f(x): return x + 1").text == ""
    assert sandbox.run("print('seen')\nf(a)").text == "seen\n21"
    failed = sandbox.run("f('x')")
    assert failed.status == "error" and 'can only concatenate str (not "int") to str' in failed.text
    assert "\x1b" not in failed.text
    child = sandbox.run("import os; os.system('echo of a child')").text
    assert sorted(child.splitlines()) == ["0", "of a child"]  # in either order
    assert "invalid syntax" in sandbox.run("def").text
    assert sandbox.run("input()").status == "error"  # nobody is there to type
    assert "not run: 'utf-8' codec can't encode" in sandbox.run("'\ud800'").text
    assert sandbox.run("print('\\ud800')").status in ("ok", "error") and sandbox.run("a").text == "20"


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
    assert drawn.text.endswith("[image 1]") and load_image(drawn.images[0]).ndim == 3  # it may speak of fonts
    many = sandbox.run("for _ in range(5): display(image)")
    assert len(many.images) == 3 and many.text.count("[an image is left out: 3 are the most]") == 2
    parts = seen.content()
    assert parts == [{"type": "text", "text": seen.text}, {"type": "image", "image": seen.images[0]}]


def test_a_pool_that_cannot_start_kernels_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with KernelPool(1) as empty:
        for _ in range(2):  # it tries again for each
            with pytest.raises(SandboxError, match="is not there"), empty.sandbox():
                pass
    with pytest.raises(SandboxError, match="the pool of kernels is closed"), empty.sandbox():
        pass
    with pytest.raises(ValueError, match="size=0"):
        KernelPool(0)


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


@pytest.mark.usefixtures("bwrap")
def test_python_may_lie_below_tmp(tmp_path):
    """/tmp is the sandbox's own, but for the folders of this Python."""
    (tmp_path / "env").symlink_to(sys.prefix)
    code = "from k25_jax.sandbox.sandbox import Sandbox\nwith Sandbox() as sandbox: print(sandbox.run('6 * 7').text)"
    command = [tmp_path / "env" / "bin" / "python", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=runs.environment(), cwd=runs.ROOT)
    assert done.stdout.strip() == "42", done.stderr[-2000:]


def test_a_file_of_many_messages_comes_out_whole(bwrap):
    with Sandbox() as sandbox:
        sandbox.run("import os; open('large', 'wb').write(bytes(range(256)) * 2**17); open('empty', 'w')")
        assert sandbox.get("large") == bytes(range(256)) * 2**17 and sandbox.get("empty") == b""
        assert sandbox.get("missing") is None and sandbox.run("1").text == "1"

"""What a kernel says otherwise than by print is what the model sees: its last state."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "code, shown",
    [
        ("len?", "Return the number of items in a container"),
        ("len??", "Return the number of items in a container"),
        ("?len", "Return the number of items in a container"),
        ("%pinfo len", "Return the number of items in a container"),
        ("%pdoc len", "Return the number of items in a container"),
        ("print('before')\nlen?", "before\nSignature"),
        ("def k25_f():\n    'Says so.'\n    return 6 * 7\n%psource k25_f", "return 6 * 7"),
        ("k25_*?", "k25_"),
        ("%quickref", "IPython"),
        ("help(len)", "Return the number of items in a container"),
        ("k25_a = 1\n%who", "k25_a"),
        ("from IPython.core.page import page; page('as a page')", "as a page"),
        ("%recall 1", "k25_seen"),
        ("get_ipython().set_next_input('the next cell')", "the next cell"),
    ],
)
def test_what_the_pager_shows(sandbox, code, shown):
    sandbox.run("k25_seen = 1")
    seen = sandbox.run(code)
    assert seen.status == "ok" and shown in seen.text and "\x1b" not in seen.text, seen


DISPLAY = "from IPython.display import *\n"
MARKUP = "class A:\n    def _repr_{0}_(self): return {1!r}\nA()"


@pytest.mark.parametrize(
    "code, text",
    [
        ("h = display('first', display_id=True); h.update('second')", "'second'"),
        ("h = display('first', display_id=True); print('x'); h.update('second'); print('y')", "'second'\nx\ny"),
        (
            "h = display('1', display_id='k'); display('2', display_id='k'); update_display('3', display_id='k')",
            "'3'\n'3'",
        ),
        ("update_display('never shown', display_id='nobody')", "'never shown'"),
        ("h = display('a', display_id=True)\nfor i in range(500): h.update(i)", "499"),
        ("print('old'); clear_output(); print('new')", "new"),
        ("print('old'); clear_output()", ""),
        ("print('old'); display('old'); clear_output(wait=True); print('new')", "new"),
        ("print('old'); clear_output(wait=True)", "old"),
        ("for i in range(300):\n    clear_output(wait=True); print(i)", "299"),
        ("print('old'); clear_output(wait=True); display('new')", "'new'"),
        ("h = display('old', display_id=True); clear_output(); h.update('new')", "'new'"),
        ("display(HTML('<b>x</b>'))", "<b>x</b>"),
        ("display(Markdown('**x**'))", "**x**"),
        ("display(Latex('$x$'))", "$x$"),
        ("display(Math('x'))", "$\\displaystyle x$"),
        ("display(JSON({'a': [1, 'é']}))", '{"a": [1, "é"]}'),
        ("display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>'))", '<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("publish_display_data({'text/html': '<i>y</i>'})", "<i>y</i>"),
        ("publish_display_data({'text/html': '<table>', 'text/plain': 'a table'})", "a table"),
        ("publish_display_data({'application/x-none': 'y'})", "[an output that cannot be shown: application/x-none]"),
        ("publish_display_data({'image/png': ''})", "[an image cannot be shown: it is empty]"),
        (MARKUP.format("markdown", "# A"), "# A"),
        ("print('x', end='')\n1", "x\n1"),
        ("import sys\nfor i in range(3): print(i); print(-i, file=sys.stderr)", "0\n0\n1\n-1\n2\n-2"),
        ("import os\nprint(1); os.system('echo 2'); print(3); os.system('echo 4 >&2'); print(5)", "1\n2\n3\n4\n5"),
        (
            "import subprocess, sys\nsubprocess.run(['echo', 'child'], stdout=sys.stdout); print('parent')",
            "child\nparent",
        ),
        ("import subprocess\nsubprocess.run(['sh', '-c', 'printf é%0999d 0']); None", "é" + "0" * 999),
        ("print('\\x1b[1;31mred\\x1b[0m and \\x1b[38;5;9mplain\\x1b[m')", "red and plain"),
        ("print('\\x1b]8;;http://a\\x1b\\\\link\\x1b]8;;\\x1b\\\\')", "link"),
    ],
)
def test_the_last_state(sandbox, code, text):
    seen = sandbox.run(DISPLAY + code)
    assert (seen.status, seen.text) == ("ok", text)


def test_an_image_that_is_updated_counts_once(sandbox):
    code = DISPLAY + "from PIL import Image\nh = display(Image.new('RGB', (2, 2)), display_id=True)\n"
    seen = sandbox.run(code + "for i in range(9): h.update(Image.new('RGB', (3 + i, 2)))\nprint('end')")
    assert seen.text == "[image 1]\nend" and len(seen.images) == 1 and seen.images[0][16:20] == b"\0\0\0\x0b"
    seen = sandbox.run("for i in range(9): clear_output(wait=True); display(Image.new('RGB', (3 + i, 2)))")
    assert seen.text == "[image 1]" and seen.images[0][16:20] == b"\0\0\0\x0b"


@pytest.mark.parametrize(
    "code, text",
    [
        ("print('\\ud800 text'); print('second')", "\ufffd text\nsecond"),
        ("print('\\udc80 text', end=''); print('\\udfff')", "\ufffd text\ufffd"),
        ("print('\\ud83d\\ude00')", "\U0001f600"),
        ("import sys; sys.stderr.write('\\udfff x\\n'); None", "\ufffd x"),
        ("class A:\n    def __repr__(self): return '\\ud800'\nA()", "\ufffd"),
        ("display({'text/plain': '\\ud800'}, raw=True)", "\ufffd"),
        ("import os; os.write(1, b'\\xff\\xfe\\n'); None", "\ufffd\ufffd"),
    ],
)
def test_halves_of_characters_lose_nothing(sandbox, code, text):
    seen = sandbox.run(code)
    assert (seen.status, seen.text) == ("ok", text)


def test_an_error_with_half_a_character(sandbox):
    seen = sandbox.run("raise ValueError('\\ud800 here')")
    assert seen.status == "error" and "ValueError: \ufffd here" in seen.text


@pytest.mark.parametrize(
    "before, line, after",
    [
        (3000, "print('\\r%d %%' % i, end='', flush=True)", 3000),
        (3000, "print('%d %%' % i, end='\\r')", 3000),
        (2000, "print('\\b' * 9 + '%8d%%' % i, end='')", 2000),
        (2000, "print('\\x1b[2K\\x1b[1G%d %%' % i, end='')", 2000),
        (2000, "print('one %d\\ntwo %d' % (i, i), end='\\x1b[1A\\r')", 2000),
    ],
)
def test_a_line_that_is_redrawn_counts_once(sandbox, before, line, after):
    code = f"for i in range({before}): {line}\nprint('\\n\\nRESULT 42')\nfor i in range({after}): {line}"
    seen = sandbox.run(code)
    assert "RESULT 42" in seen.text and len(seen.text) < 100 and "left out" not in seen.text, seen.text


@pytest.mark.parametrize("options", ["", ", leave=False", ", ascii=True", ", file=__import__('sys').stdout"])
def test_progress_bars_of_tqdm(sandbox, options):
    code = f"from tqdm import tqdm\nfor i in tqdm(range(3000), mininterval=0{options}): pass\nprint('RESULT 42')"
    seen = sandbox.run(code)
    assert seen.text.endswith("RESULT 42") and seen.text.count("it/s") <= 1 and len(seen.text) < 200
    assert ("3000/3000" in seen.text) == ("leave" not in options)


def test_progress_bars_of_rich(sandbox):
    code = "from rich.console import Console\nfrom rich.progress import Progress\nimport sys\n"
    code += "console = Console(file=sys.stdout, force_terminal=True, force_jupyter=False, width=60)\n"
    code += "with Progress(console=console) as progress:\n"
    code += "    a, b = progress.add_task('one', total=200), progress.add_task('two', total=200)\n"
    code += "    for _ in range(200): progress.advance(a); progress.advance(b); progress.refresh()\nprint('RESULT 42')"
    seen = sandbox.run(code)
    assert seen.text.endswith("RESULT 42") and seen.text.count("one") == seen.text.count("two") == 1, seen.text
    assert seen.text.count("100%") == 2


@pytest.mark.usefixtures("bwrap")
@pytest.mark.parametrize("spelling", ["up", "link", "both"])
def test_an_interpreter_by_any_path(tmp_path, spelling):
    """Relative, through links, with `..`."""
    link = tmp_path / "deep" / "env"
    link.parent.mkdir()
    link.symlink_to(sys.prefix)
    up = os.path.join(os.path.relpath("/", ROOT), "usr", "..")
    folder = {"up": up + sys.prefix, "link": link, "both": f"{up}{link.parent}/../deep/env"}[spelling]
    python = os.path.join(folder, "bin", "python")
    code = "from k25_jax.sandbox.sandbox import Sandbox\nwith Sandbox() as sandbox: print(sandbox.run('6 * 7').text)"
    command = [python, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=runs.environment(), cwd=ROOT)
    assert done.stdout.strip() == "42", done.stderr[-2000:]

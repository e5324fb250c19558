"""Benchmarks from small files of our own in the published formats: read, asked, scored, and refused when damaged."""

import base64
import csv
import io
import json

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from answerers import Scripted
from k25_jax.cli import main
from k25_jax.config import ConfigError
from k25_jax.data.records import DataError
from k25_jax.evals.benchmarks import BENCHMARKS, load_benchmark
from k25_jax.evals.core import evaluate
from k25_jax.evals.protocol import Settings
from k25_jax.evals.summary import summarise
from k25_jax.vision.image import load_image


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((28, 28, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def image(shade: int) -> dict:
    """An image as Parquet files of published data sets have it."""
    return {"bytes": png(shade), "path": f"{shade}.png"}


def parquet(path, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), dialect="excel-tab" if path.suffix == ".tsv" else "excel")
        writer.writeheader()
        writer.writerows(rows)


GPQA = [
    {"Question": f"What, roughly, is {i}\nplus one?", "Correct Answer": f"{i + 1}\n", "Incorrect Answer 1": "90",
     "Incorrect Answer 2": "91, perhaps", "Incorrect Answer 3": "92", "High-level domain": ("Physics", "Biology")[i % 2]}
    for i in range(4)
]  # fmt: skip
MMLU = [
    {"question_id": i, "question": "Which is even?", "options": ["1", "N/A", "3", "4", "N/A"], "answer": "D",
     "answer_index": 3, "category": "math", "cot_content": "", "src": "own"}
    for i in range(2)
]  # fmt: skip
MMMU = [
    {"id": "a_1", "question": "Is <image 1> darker than <image 2>?", "options": "['yes', \"no, it isn't\", '<image 2>']",
     "image_1": image(10), "image_2": image(200), "image_3": None, "answer": "A", "question_type": "multiple-choice",
     "subfield": "Shades"},
    {"id": "a_2", "question": "How dark is it?", "options": "[]", "image_1": image(10), "image_2": None, "image_3": None,
     "answer": "['10', 'ten']", "question_type": "open", "subfield": "Shades"},
]  # fmt: skip
VISTA = [
    {"pid": "1", "question": "How many?", "image": "images/1.jpg", "decoded_image": image(1), "choices": None, "unit": None,
     "precision": None, "answer": "7", "question_type": "free_form", "answer_type": "integer", "metadata": {"task": "FQA"}},
    {"pid": "2", "question": "How long?", "image": "images/2.jpg", "decoded_image": image(2), "choices": None, "unit": "cm",
     "precision": 1.0, "answer": "1.5", "question_type": "free_form", "answer_type": "float", "metadata": {"task": "GPS"}},
    {"pid": "3", "question": "Where?", "image": "images/3.jpg", "decoded_image": image(3), "choices": None, "unit": None,
     "precision": None, "answer": "[1, 2]", "question_type": "free_form", "answer_type": "list", "metadata": {"task": "GPS"}},
    {"pid": "4", "question": "Which?", "image": "images/4.jpg", "decoded_image": image(4), "choices": ["145°", "35°"],
     "unit": None, "precision": None, "answer": "145°", "question_type": "multi_choice", "answer_type": "text",
     "metadata": {"task": "GPS"}},
]  # fmt: skip
OCR = [
    {"dataset": "IIIT5K", "question": "what is written in the image?", "question_type": "Regular Text Recognition",
     "answer": ["CENTRE"], "image": image(5)},
    {"dataset": "HME100k", "question": "Write the formula in LaTeX.", "answer": ["x = \\frac { 1 } { 2 }"],
     "question_type": "Handwritten Mathematical Expression Recognition", "image": image(6)},
]  # fmt: skip
DOC = [{"questionId": "9", "question": "When?", "answers": ["March 5", "5 March"], "image": image(7), "docId": 3}]
CHARXIV = [
    {"category": "cs", "figure_path": "images/0.jpg", "num_subplots": 2, "subplot_row": 1, "subplot_col": 2,
     "subplot_loc": None, "descriptive_q1": 1, "descriptive_a1": "Loss by step", "descriptive_q2": 14,
     "descriptive_a2": "Not Applicable", "descriptive_q3": 19, "descriptive_a3": "2", "descriptive_q4": 13,
     "descriptive_a4": "ours, theirs", "reasoning_q": "Which is lower at the end?", "reasoning_a": "Ours",
     "reasoning_a_type": 1, "image": image(8)},
]  # fmt: skip
VIDEO = [
    {"video_id": "001", "duration": "short", "domain": "Knowledge", "videoID": "fFjv93ACGo8", "question_id": "001-1",
     "question": "What moves?", "options": ["A. A ball.", "B. A car.", "C. Nothing.", "D. The camera."], "answer": "C"},
]  # fmt: skip
AIME = [
    {"problem_idx": i, "problem": f"Find {i}+{i}.", "answer": 2 * i, "problem_type": ["Algebra"]} for i in range(1, 4)
]
HMMT = [{"problem": "Find $x$ with $4x=2$.", "answer": "\\frac{1}{2}"}]

# Benchmark -> (file, how it is written, rows, right answers in other words than the file's, wrong ones).
FILES = {
    "aime": ("a.parquet", parquet, AIME, ["\\boxed{002}", "so 4", "\\boxed{12/2}"], ["\\boxed{3}", "", "no"]),
    "hmmt": ("h.jsonl", jsonl, HMMT, ["Thus \\boxed{0.5}"], ["\\boxed{2}"]),
    "gpqa": ("g.csv", table, GPQA, None, None),
    "mmlu_pro": ("m.parquet", parquet, MMLU, None, None),
    "mmmu": ("u.parquet", parquet, MMMU, [None, "Answer: Ten"], [None, "Answer: 11"]),
    "mmmu_pro": ("p.parquet", parquet, [MMMU[0] | {"subject": "Shades"}], None, None),
    "mmmu_pro_vision": ("v.parquet", parquet, [{"id": "1", "image": image(9), "options": "['x', 'y']", "answer": "B"}],
                        ["Answer: B"], ["Answer: A"]),
    "mathvista": ("s.parquet", parquet, VISTA, ["Answer: 7 apples", "Answer: 1.52 cm", "Answer: [1.0, 2]", None],
                  ["Answer: 8", "Answer: 1.6", "Answer: [2, 1]", None]),
    "ocrbench": ("o.parquet", parquet, OCR, ["It says: Centre.", "$x=\\frac{1}{2}$"], ["cent re", "$X=\\frac{1}{2}$"]),
    "docvqa": ("d.parquet", parquet, DOC, ["Answer: 5 march"], ["Answer: never"]),
    "infovqa": ("i.parquet", parquet, DOC, ["Answer: march 5"], ["Answer: never"]),
    "charxiv_reasoning": ("c.parquet", parquet, CHARXIV, ["Answer: ours."], ["Answer: theirs"]),
    "charxiv_descriptive": ("c.parquet", parquet, CHARXIV,
                            ["Answer: loss by step", "Answer: N/A", "Answer: 2 subplots", "Answer: Ours, Theirs"],
                            ["Answer: loss", "Answer: 3", "Answer: 3", "Answer: theirs, ours"]),
    "videomme": ("videomme/t.parquet", parquet, VIDEO, None, None),
}  # fmt: skip


@pytest.fixture
def load(tmp_path):
    """Writes the small file of a benchmark, and loads it."""

    def make(name: str, change=None):
        file, write, rows, *_ = FILES[name]
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        write(path, change(json.loads(json.dumps(rows))) if change else rows)
        if name == "videomme":
            (tmp_path / "data").mkdir(exist_ok=True)
            clip(tmp_path / "data" / "fFjv93ACGo8.mp4")
        return load_benchmark(name, path)

    return make


def clip(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 32
        for shade in range(8):
            out.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * shade, np.uint8), format="rgb24"))
            )
        out.mux(stream.encode())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_gold_answers_are_right_and_others_are_not(load, name):
    task = load(name)
    task.validate()
    *_, right, wrong = FILES[name]
    assert not right or len(right) == len(wrong) == len(task)
    for index in range(len(task)):
        for seed in range(4):
            (message,) = task.prompt(index, seed)
            text = "".join(part.get("text", "") for part in message["content"])
            assert task.hint(index) in text and "N/A" not in text.replace("N/A is", "")
            assert task.score(f"Answer: {task.gold(index, seed)}", index, seed) == 1
            for answers, score in ((right, 1), (wrong, 0)):
                if answers and answers[index] is not None:
                    assert task.score(answers[index], index, seed) == score, answers[index]
    assert 0 <= task.guessing(range(len(task))) <= 1


@pytest.mark.parametrize("name", ["gpqa", "mmlu_pro", "mmmu_pro", "videomme"])
def test_options_are_shown_in_an_order_of_each_sample(load, name):
    """One who looks for the right option's text finds it; one who always says A is right by chance only."""
    task = load(name)
    options, right = task.options(0), task.right(0)
    letters = set()
    for seed in range(64):
        text = task.text(0, seed)
        for option in options:
            assert text.count(f") {option}") == 1
        (letter,) = [line[0] for line in text.splitlines() if line[1:] == f") {options[right]}"]
        assert letter == task.gold(0, seed) and task.text(0, seed) == text
        letters.add(letter)
    assert letters == set("ABCDEFGHIJ"[: len(options)])


def test_an_evaluation_with_permuted_options(load):
    """Through the evaluator: one who reads scores 1, and one who says A scores about 1 in 4."""
    task = load("gpqa")

    def reads(request, _):
        text = request.messages[0]["content"][-1]["text"]
        wanted = str(int(text.split("is ")[1].split("\n")[0]) + 1)
        return f"Answer: {next(line[0] for line in text.splitlines() if line[1:] == f') {wanted}')}"

    settings = Settings(k=64)
    score = summarise(task, evaluate(Scripted(reads), task, settings, range(4)))
    assert score.score == 1 and score.groups == {"Biology": 1, "Physics": 1} and score.guessing == 0.25
    lazy = summarise(task, evaluate(Scripted(lambda *_: "Answer: A"), task, settings, range(4)))
    assert 0.15 < lazy.score < 0.35 and lazy.passed["64"] == 1


def test_pictures_stand_where_they_are_named(load):
    content = load("mmmu").prompt(0, 0)[0]["content"]
    shades = [int(load_image(part["image"])[0, 0, 0]) for part in content if "image" in part]
    assert shades == [10, 200] and content[0]["text"] == "Is " and content[2]["text"] == " darker than "
    assert "(image 2 above)" in "".join(part.get("text", "") for part in content)
    assert load_image(load("mathvista").prompt(1, 0)[0]["content"][0]["image"])[0, 0, 0] == 2
    (picture, text) = load("mmmu_pro_vision").prompt(0, 0)[0]["content"]
    assert "options from A to B" in text["text"] and "image" in picture


def test_other_published_forms(tmp_path, load):
    """Images as paths and in base64; JSON by ids; the original names of OCRBench's fields."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(33))
    row = {"dataset_name": "x", "image_path": "images/1.png", "question": "?", "answers": "seven", "type": "Scene"}
    (tmp_path / "OCRBench.json").write_text(json.dumps([row]))
    task = load_benchmark("ocrbench", tmp_path / "OCRBench.json")
    task.validate()
    assert load_image(task.media(0)[0]["image"])[0, 0, 0] == 33 and task.group(0) == "Scene"
    coded = base64.b64encode(np.random.default_rng(0).bytes(400) + png(44)).decode()
    table(tmp_path / "o.tsv", [{"index": 0, "image": coded, "question": "?", "answer": "seven"}])
    assert load_benchmark("ocrbench", tmp_path / "o.tsv").media(0)[0]["image"].endswith(png(44))
    free = {key: value for key, value in VISTA[0].items() if key != "decoded_image"} | {"image": "images/1.png"}
    (tmp_path / "testmini.json").write_text(json.dumps({"1": free}))
    assert load_benchmark("mathvista", tmp_path / "testmini.json").score("Answer: 7", 0, 0) == 1
    folder = tmp_path / "shards"
    folder.mkdir()
    parquet(folder / "0.parquet", AIME[:2])
    parquet(folder / "1.parquet", AIME[2:])
    assert [load_benchmark("aime", folder).golds(i) for i in range(3)] == [["2"], ["4"], ["6"]]


def without(field):
    return lambda rows: [{key: value for key, value in row.items() if key != field} for row in rows]


def changed(**fields):
    return lambda rows: [rows[0] | fields, *rows[1:]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hmmt", without("answer"), r"h.jsonl:1: has no answer or Answer, only problem; is it this benchmark's file"),
        ("hmmt", changed(answer=["x"]), r"h.jsonl:1: answer must be str or int or float, not list"),
        ("aime", changed(answer=None), r"a.parquet\[0\]: has no answer"),
        ("gpqa", without("Incorrect Answer 2"), r"g.csv\[0\]: has no Incorrect Answer 2"),
        ("mmlu_pro", changed(answer="J"), r"m.parquet\[0\]: the answer 'J' is none of its 5 options"),
        ("mmlu_pro", changed(options=["1"], answer="A"), r"m.parquet\[0\]: 1 options; there must be 2 to 26"),
        ("videomme", changed(videoID="../../secret"), r"videoID '../../secret' is not the name of a video"),
        ("videomme", changed(videoID="gone"), r"there is no gone.mp4 in"),
    ],
)
def test_files_that_will_not_do_are_named_with_the_field(load, name, change, message):
    with pytest.raises(DataError, match=message):
        load(name, change).validate()


def test_more_that_will_not_do(tmp_path):
    for rows, name, message in (
        ([MMMU[0] | {"options": "not a list"}], "mmmu", r"x.parquet\[0\]: options must be a list"),
        ([MMMU[0] | {"image_2": None}], "mmmu", r"x.parquet\[0\]: has no image_2, which its text names"),
        ([VISTA[0] | {"answer_type": "word"}], "mathvista", r"answer_type is 'word'"),
        ([VISTA[0] | {"answer": "seven"}], "mathvista", "answer 'seven' is no integer"),
        (
            [CHARXIV[0] | {"descriptive_q3": 77}],
            "charxiv_descriptive",
            r"question 3: descriptive_q3=77 must be 1 to 19",
        ),
        ([OCR[0] | {"image": {"bytes": None, "path": "../a.png"}}], "ocrbench", r"x.parquet\[0\]: image: "),
    ):
        parquet(tmp_path / "x.parquet", rows)
        task = load_benchmark(name, tmp_path / "x.parquet")
        with pytest.raises(DataError, match=message):
            task.validate()
            task.prompt(0, 0)
    for file, content, message in (
        ("a.json", "{", "is not JSON"),
        ("b.json", "[1]", "must be a list of objects"),
        ("c.jsonl", "[]\n{}\n", "must be a JSON object"),
        ("d.parquet", "no", "no Parquet file"),
        ("e.txt", "x", "its name must end in"),
        ("f.csv", "a,b\n", "has no rows"),
    ):
        (tmp_path / file).write_text(content)
        with pytest.raises(DataError, match=message):
            load_benchmark("hmmt", tmp_path / file).validate()
    with pytest.raises(ConfigError, match="did you mean 'aime'"):
        load_benchmark("aimee", tmp_path)


def test_other_data_or_wording_gives_another_digest(load, monkeypatch):
    digest = load("gpqa").digest()
    assert load("gpqa").digest() == digest
    assert load("gpqa", changed(**{"Correct Answer": "17"})).digest() != digest
    task = load("gpqa")
    monkeypatch.setattr(type(task), "hint", lambda self, index: "Guess.")
    assert task.digest() != digest


def test_the_command_asks_a_benchmark(finished, load, tmp_path, capsys):
    """A minute model knows nothing, but its answers are asked for, counted, kept and not asked for again."""
    load("ocrbench")
    out = tmp_path / "out"
    command = ["eval", f"--checkpoint={finished.run}", "--task=ocrbench", f"--data={tmp_path / 'o.parquet'}", "--k=2",
               "--max_tokens=4", f"--workdir={out}", "--json"]  # fmt: skip
    assert main(command) == 0
    (score,) = json.loads(capsys.readouterr().out)
    assert score["spec"] == "ocrbench" and score["questions"] == 2 and score["k"] == 2 and score["failed"] == 0
    assert set(score["passed"]) == {"1", "2"} and 0 < score["tokens"] <= 4
    lines = (out / "ocrbench.jsonl").read_text()
    assert len(lines.splitlines()) == 1 + 4 and main(command) == 0
    assert (out / "ocrbench.jsonl").read_text() == lines
    assert "ocrbench" in (out / "evals.md").read_text()

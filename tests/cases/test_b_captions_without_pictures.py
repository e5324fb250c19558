"""A caption whose picture is missing, linked, of an unknown kind or called a little otherwise is never a text document."""

import io
import itertools
import json
import os
import subprocess
import tarfile
import unicodedata

import numpy as np
import pytest
from given import PNG, picture, png
from PIL import Image

from k25_jax.config import DataConfig, SourceConfig, preset
from k25_jax.data.forms import form_of, prepare
from k25_jax.data.records import RecordError
from k25_jax.data.sources import open_source
from k25_jax.text.tokenizer import load_tokenizer
from k25_jax.vision.image import preprocess

MODEL, TOKENIZER, DATA = preset("tiny"), load_tokenizer(), DataConfig(packs=2, pack_patches=64, seq_len=256)


def outcome(record) -> str:
    """The form that a record is learnt in, or the reason why it is not."""
    try:
        prepare(record, TOKENIZER, DATA, MODEL)
    except RecordError as problem:
        return problem.reason
    return form_of(record.data)


def in_tar(tmp_path, members):
    """Members are (name, bytes), or (name, target) for a symbolic link, or (name, (target,)) for a hard one."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            elif data is None:
                info.type = tarfile.DIRTYPE
            else:
                hard = isinstance(data, tuple)
                info.type, info.linkname = (tarfile.LNKTYPE, data[0]) if hard else (tarfile.SYMTYPE, data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return open_source(SourceConfig(str(tmp_path / "x.tar")))


def in_folder(tmp_path, members):
    for name, data in members:
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            file.mkdir()
        elif isinstance(data, bytes):
            file.write_bytes(data)
        elif isinstance(data, tuple):
            os.link(tmp_path / "folder" / data[0], file)
        else:
            file.symlink_to(data)
    return open_source(SourceConfig(str(tmp_path / "folder")))


BOTH = pytest.mark.parametrize("given", [in_tar, in_folder])


def outcomes(source) -> dict[str, str]:
    """By the records' names."""
    records = [source[i] for i in range(len(source))]
    names = [record.name.rpartition("[")[2].rstrip("]") if ".tar[" in record.name
             else os.path.splitext(os.path.basename(record.name))[0] for record in records]  # fmt: skip
    return dict(zip(names, map(outcome, records), strict=True))


# ---------------------------------------------------------------------------------------------------------------- links
def test_hard_links_of_gnu_tar(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(PNG)
    (tmp_path / "d" / "a.txt").write_text("cat")
    os.link(tmp_path / "d" / "a.png", tmp_path / "d" / "b.png")
    (tmp_path / "d" / "b.txt").write_text("dog")
    command = ["tar", "-cf", "x.tar", "--sort=name", "-C", "d", "a.png", "a.txt", "b.png", "b.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    source = open_source(SourceConfig(str(tmp_path / "x.tar")))
    for index, text in enumerate(("cat", "dog")):
        example = prepare(source[index], TOKENIZER, DATA, MODEL)
        assert text in TOKENIZER.decode(example.tokens) and len(example.clips) == 1
        assert np.array_equal(example.clips[0].patches, preprocess(picture(), MODEL.vision).patches)


LINKS = {  # members -> what becomes of b
    "a hard link": ([("a.png", PNG), ("a.txt", b"x"), ("b.png", ("a.png",))], "pair"),
    "a hard link to a hard link": ([("a.png", PNG), ("a.txt", b"x"), ("c.png", ("a.png",)), ("c.txt", b"x"),
                                    ("b.png", ("c.png",))], "pair"),
    "a hard link with a dot before": ([("./a.png", PNG), ("./a.txt", b"x"), ("b.png", ("./a.png",))], "pair"),
    "a hard link to a later member": ([("b.png", ("a.png",)), ("a.png", PNG), ("a.txt", b"x")], "missing"),
    "a hard link to nothing": ([("b.png", ("a.png",))], "missing"),
    "a hard link to itself": ([("b.png", ("b.png",))], "missing"),
    "a hard link out of it": ([("b.png", ("/etc/passwd",))], "path"),
    "a hard link to a symbolic one": ([("d/a.png", PNG), ("d/a.txt", b"x"), ("d/c.png", "a.png"), ("d/c.txt", b"x"),
                                       ("b.png", ("d/c.png",))], "pair"),
    "a symbolic link": ([("a.png", PNG), ("a.txt", b"x"), ("b.png", "a.png")], "pair"),
    "a symbolic link to a later member": ([("b.png", "a.png"), ("a.png", PNG), ("a.txt", b"x")], "pair"),
    "a symbolic link to a folder beside": ([("p/a.png", PNG), ("p/a.txt", b"x"), ("b.png", "./p/../p/a.png")], "pair"),
    "symbolic links in a row": ([("a.png", PNG), ("a.txt", b"x"), *((f"l{i}", f"l{i + 1}") for i in range(9)),
                                 ("l9", "a.png"), ("b.png", "l0")], "pair"),
    "a symbolic link to nothing": ([("b.png", "a.png")], "missing"),
    "a symbolic link to itself": ([("b.png", "b.png")], "path"),
    "symbolic links in a circle": ([("c.png", "b.png"), ("c.txt", b"x"), ("b.png", "c.png")], "path"),
    "a symbolic link out of it": ([("b.png", "../../etc/passwd")], "path"),
    "a symbolic link to the root": ([("b.png", "/etc/passwd")], "path"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINKS)
def test_links_in_a_tar(tmp_path, case):
    members, expected = LINKS[case]
    source = in_tar(tmp_path, [*members, ("b.txt", b"dog")])
    found = outcomes(source)
    assert found.pop("b") == expected
    assert found.get("a", "pair") == "pair" and "text" not in found.values()
    if expected != "pair":
        index = next(i for i in range(len(source)) if source[i].name.endswith("[b]"))
        with pytest.raises(RecordError, match="b.png: a link to"):
            prepare(source[index], TOKENIZER, DATA, MODEL)


def test_ten_thousand_links_in_a_row_end(tmp_path):
    links = [(f"l{i}.png", f"l{i + 1}.png") for i in range(10_000)]
    found = outcomes(in_tar(tmp_path, [*links, ("l9.txt", b"x"), ("k.txt", b"k")]))
    assert found["l9"] == "path" and found["k"] == "missing"


def test_a_link_to_a_text_and_a_link_to_a_folder(tmp_path):
    source = in_tar(tmp_path, [("a.txt", b"x"), ("d/b.txt", b"y"), ("c.txt", "a.txt"), ("latest", "d")])
    assert outcomes(source) == {"a": "text", "d/b": "text", "c": "text"}


def test_links_in_a_folder(tmp_path):
    (tmp_path / "out.png").write_bytes(PNG)
    (tmp_path / "folder").mkdir()
    members = [("a.png", PNG), ("a.txt", b"x"), ("b.png", ("a.png",)), ("b.txt", b"x"), ("c.png", "a.png"), ("c.txt", b"x"),
               ("d.png", "../out.png"), ("d.txt", b"x"), ("e.png", "nothing"), ("e.txt", b"x"), ("f.png", "f.png"),
               ("f.txt", b"x"), ("g.png", str(tmp_path / "out.png")), ("g.txt", b"x"), ("h.png", PNG),
               ("h.txt", "/etc/hostname"), ("i.md", "/etc/hostname")]  # fmt: skip
    found = outcomes(in_folder(tmp_path, members))
    assert found == {**dict.fromkeys("abc", "pair"), **dict.fromkeys("dghi", "path"), "e": "missing", "f": "path"}


# -------------------------------------------------------------------------------------------------------- unknown kinds
@BOTH
@pytest.mark.parametrize("ending", "heic HEIC heif avif jxl svg wav mp3 flac pdf psd cr2 ts mpg xyz bin".split())
def test_a_medium_of_an_unknown_kind(tmp_path, given, ending):
    source = given(tmp_path, [(f"a.{ending}", b"x" * 99), ("a.txt", b"a photo")])
    assert outcomes(source) == {"a": "unknown medium"}
    assert f"a.{ending}: a medium of an unknown kind" in str(source[0].data)


@BOTH
def test_a_file_without_ending_and_a_caption_as_json(tmp_path, given):
    assert outcomes(given(tmp_path, [("a", b"x" * 99), ("a.txt", b"a photo")])) == {"a": "unknown medium"}
    other = tmp_path / "other"
    other.mkdir()
    source = given(
        other, [("a.heic", b"x" * 99), ("a.json", b'{"text": "a photo"}'), ("b.avif", b"x"), ("b.caption", b"x")]
    )
    assert outcomes(source) == {"a": "unknown medium", "b": "unknown medium"}


# ------------------------------------------------------------------------------------------------ other names of a pair
NFC, NFD = (unicodedata.normalize(form, "Ĝé한") for form in ("NFC", "NFD"))
PAIRS = [
    ("IMG_1.JPG", "IMG_1.TXT"), ("IMG_1.JPG", "IMG_1.Txt"), ("IMG_1.jpg", "img_1.txt"), ("A.Png", "a.TXT"),
    ("x.png", "x.png.txt"), ("x.PNG", "X.png.TXT"), ("x.png", "x.caption"), (f"{NFC}.png", f"{NFD}.txt"),
    (f"{NFD}.png", f"{NFC.upper()}.txt"), (f"{NFD}.png", f"{NFC}.png.txt"), ("a.b.c.png", "a.b.c.txt"),
    ("shot at 10.20.30.png", "shot at 10.20.30.txt"), ("x.y.png", "x.y.png.txt"), ("STRASSE.png", "straße.txt"),
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("medium, caption", PAIRS)
def test_names_that_belong_together(tmp_path, given, medium, caption):
    jpeg = io.BytesIO()
    Image.fromarray(picture()).save(jpeg, "JPEG")
    other = ("zz.png", PNG), ("zz.txt", b"other")
    source = given(
        tmp_path, [(medium, PNG if "png" in medium.lower() else jpeg.getvalue()), (caption, b"the caption"), *other]
    )
    assert sorted(outcomes(source).values()) == ["pair", "pair"] and source.left_out == {}
    texts = [TOKENIZER.decode(prepare(source[i], TOKENIZER, DATA, MODEL).tokens) for i in range(2)]
    assert sum("the caption" in text for text in texts) == 1


@BOTH
def test_the_same_with_json(tmp_path, given):
    members = [("x.png", PNG), ("x.png.json", b'{"caption": "one"}'), ("Y.PNG", PNG), ("y.JSON", b'{"ocr": "two"}')]
    source = given(tmp_path, members)
    assert sorted(outcomes(source).values()) == ["ocr", "pair"]


@BOTH
def test_names_that_differ_in_case_alone_do_not_get_mixed(tmp_path, given):
    members = [("a.png", png(1)), ("A.png", png(2)), ("a.txt", b"small"), ("A.txt", b"large"), ("b.png", png(3)),
               ("B.png", png(4)), ("b.txt", b"only"), ("c.png", png(5)), ("C.txt", b"one"), ("c.TXT", b"two"),
               ("de.png", png(6)), ("DE.png", png(7)), ("De.txt", b"of which?"), ("fg.png", png(8)), ("Fg.txt", b"which?"),
               ("FG.txt", b"which?")]  # fmt: skip
    source = given(tmp_path, members)
    found = {}
    for i in range(len(source)):
        if outcome(source[i]) == "pair":
            example = prepare(source[i], TOKENIZER, DATA, MODEL)
            seed = next(s for s in range(1, 9) if np.array_equal(example.clips[0].patches,
                                                                 preprocess(picture(s), MODEL.vision).patches))  # fmt: skip
            found[seed] = source[i].data["text"]
    assert found == {1: "small", 2: "large", 3: "only", 5: "two"}
    assert "text" not in outcomes(source).values()


def test_members_in_any_order_are_pairs(tmp_path):
    members = [
        ("a.png", PNG),
        ("b.png", PNG),
        ("a.txt", b"cat"),
        ("c.0.png", PNG),
        ("c.0.txt", b"x"),
        ("b.txt", b"dog"),
    ]
    for number, order in enumerate(itertools.islice(itertools.permutations(members), 0, 720, 50)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert outcomes(in_tar(folder, order)) == {"a": "pair", "b": "pair", "c.0": "pair"}


# ----------------------------------------------------------------------------------------------- a picture that is absent
@BOTH
def test_a_caption_among_pairs_is_no_text(tmp_path, given):
    source = given(
        tmp_path, [("a.png", PNG), ("a.txt", b"cat"), ("b.txt", b"dog"), ("d/e.txt", b"a text far from pictures")]
    )
    found = outcomes(source)
    assert found.pop("b") == "missing" and found.pop("a") == "pair"
    assert list(found.values()) == ["text"]
    index = next(i for i in range(len(source)) if "b" in os.path.basename(source[i].name).split(".tar")[-1][:3])
    assert "b.txt: a caption without its picture" in str(source[index].data)


@BOTH
def test_a_caption_called_after_a_picture_that_is_absent(tmp_path, given):
    assert outcomes(given(tmp_path, [("b.png.txt", b"dog"), ("c.txt", b"text")])) == {"b.png": "missing", "c": "text"}


@BOTH
def test_pictures_in_one_folder_and_captions_in_another(tmp_path, given):
    members = [("images/a.png", PNG), ("labels/a.txt", b"cat"), ("labels/b.txt", b"dog"), ("docs/read.txt", b"words")]
    found = {os.path.basename(name): how for name, how in outcomes(given(tmp_path, members)).items()}
    assert (found["b"], found["read"]) == ("missing", "text") and found["a"] != "text"


def test_texts_alone_are_texts_and_json_says_what_it_is(tmp_path):
    assert outcomes(in_folder(tmp_path, [("a.txt", b"x"), ("b/c.txt", b"y"), ("d.md", b"z"), ("t.csv", b"1,2")])) == {
        "a": "text", "c": "text", "d": "text"}  # fmt: skip
    explicit = json.dumps({"parts": [{"text": "said to be a text"}]}).encode()
    members = [("a.png", PNG), ("a.txt", b"x"), ("b.json", b'{"text": "a dog"}'), ("c.json", explicit), ("e.txt", b"x"),
               ("e.cls", b"3")]  # fmt: skip
    assert outcomes(in_tar(tmp_path, members)) == {"a": "pair", "b": "missing", "c": "interleaved", "e": "missing"}
    (tmp_path / "only").mkdir()
    assert outcomes(in_tar(tmp_path / "only", [("e.txt", b"x"), ("e.cls", b"3"), ("1.2.txt", b"y")])) == {
        "e": "text", "1.2": "text"}  # fmt: skip


def test_documents_beside_pictures_stay(tmp_path):
    found = outcomes(
        in_folder(tmp_path, [("a.png", PNG), ("a.txt", b"cat"), ("notes.md", b"# Notes"), ("code.py", b"x = 1")])
    )
    assert found == {"a": "pair", "notes": "text", "code": "text"}


def test_a_folder_called_as_a_picture(tmp_path):
    source = in_folder(tmp_path, [("x.png", None), ("x.txt", b"a caption"), ("clip.mp4/1.md", b"a text")])
    assert outcomes(source) == {"x": "file", "1": "text"}

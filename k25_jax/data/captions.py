"""Which files are media, which are captions, and which caption belongs to which medium (K2.5 §3.3).

One set of rules for folders and archives. The caption of `cat.png` is `cat.txt`, `cat.caption` or `cat.json`, or the same
after the whole name (`cat.png.txt`); names that differ in Unicode's normal form or in case belong together where nothing
else does. A caption is never a text of its own: where a folder holds captions, a `.txt` without a medium is a bad record.
"""

import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from k25_jax.data.records import RecordError

IMAGES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov")
OTHER_MEDIA = tuple(
    ".heic .heif .avif .jxl .jp2 .j2k .svg .eps .psd .dng .raw .cr2 .cr3 .nef .arw .ico .tga .exr .hdr .ppm .pgm .pnm "
    ".wav .mp3 .flac .ogg .oga .opus .m4a .aac .wma .aif .aiff .mid .mpg .mpeg .wmv .flv .3gp .ogv .mts .m2ts .vob".split()
)  # that nothing here reads
CAPTIONS = (".json", ".txt", ".caption")
TEXTS = (".txt", ".md", ".py")
PLAIN = (*CAPTIONS, *TEXTS, *".jsonl .ndjson .csv .tsv .xml .yaml .yml .toml .ini .cfg .html .htm .tex .rst .log .srt .vtt "
         ".cls .cls2 .id .key .index .url .license".split())  # fmt: skip  # text about a record: no medium
SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
                  "network trash folder", "temporary items")  # fmt: skip
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "desktop db", "desktop df")
SYSTEM, OTHER = (
    "file of an operating system",
    "other file",
)  # the words under which files that gave no record are counted
GIVEN = ("text", "caption", "ocr", "parts", "messages", "conversations")  # a record with one of them needs no caption
OWN_MEDIA = ("parts", "messages", "image", "image_base64", "video", "video_base64")  # .. needs no medium beside it
FOLDS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()),
)  # from strict to lax


# ---------------------------------------------------------------------------------------------------------------- names
def is_system_file(path: str) -> bool:
    """Whether an operating system or a tool added a file, given by its path below the source; dot files are such too."""
    parts = [part.lower() for part in path.split("/") if part not in ("", ".", "..")]
    if any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts):
        return True
    return bool(parts) and (parts[-1] in SYSTEM_FILES or parts[-1].endswith(("@synoeastream", "@synoresource")))


def ending(name: str) -> str:
    """The last ending of a file's name, in small letters, with its dot; "" when it has none."""
    return posixpath.splitext(name)[1].lower()


def medium_kind(name: str) -> str:
    """The words "image" or "video" for a file that is read as such, else ""."""
    return "image" if ending(name) in IMAGES else "video" if ending(name) in VIDEOS else ""


def stem(name: str) -> str:
    """The name without its last ending."""
    return posixpath.splitext(name)[0]


def printable(name: str) -> str:
    """A file's name for messages: what is not UTF-8, and line breaks and the like, become question marks."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


# ---------------------------------------------------------------------------------------------------------------- pairs
def captions_of(media: Sequence[str], captions: Sequence[str]) -> dict[str, list[str]]:
    """The captions of each medium that has some, among names of one folder; the order is that of `CAPTIONS`.

    Exact names go first, then those alike but for their normal form, then but for case; where those would fit several
    ways they fit none.
    """
    found: dict[str, list[str]] = {}
    for number, fold in enumerate(FOLDS):
        taken = {caption for own in found.values() for caption in own}
        free: dict[str, list[str]] = {}
        for caption in captions:
            if caption not in taken:
                free.setdefault(fold(stem(caption)), []).append(caption)
        claims = {name: [caption for key in dict.fromkeys((fold(stem(name)), fold(name))) for caption in free.get(key, ())]
                  for name in media if name not in found}  # fmt: skip
        claimants: dict[str, set[str]] = {}
        for name, own in claims.items():
            for caption in own:
                claimants.setdefault(caption, set()).add(stem(name))
        for name, own in claims.items():
            clear = number == 0 or (_differ(own) and all(len(claimants[caption]) == 1 for caption in own))
            if own and clear:
                found[name] = sorted(own, key=lambda caption: CAPTIONS.index(ending(caption)))
    return found


def _differ(captions: Sequence[str]) -> bool:
    return len({ending(caption) for caption in captions}) == len(captions)


def caption_folders(media: Iterable[str], texts: Iterable[str]) -> set[str]:
    """The folders whose texts are captions: those with a medium, or with a text named as a medium of another folder is."""
    media = list(media)
    stems = {FOLDS[-1](stem(posixpath.basename(path))) for path in media}
    folders = {posixpath.dirname(path) for path in media}
    return folders | {posixpath.dirname(path) for path in texts if FOLDS[-1](stem(posixpath.basename(path))) in stems}


def is_named_as_caption(name: str) -> bool:
    """Whether a text is called after a medium, as `cat.png.txt` is."""
    return ending(stem(name)) in IMAGES + VIDEOS + OTHER_MEDIA


def without_medium(name: str) -> RecordError:
    """What is wrong with a caption that lies alone."""
    return RecordError(
        "missing",
        f"{printable(name)}: a caption without its picture or video; add it, or keep texts apart from captions (in a folder "
        'or archive of their own, or as JSON {"parts": [{"text": ".."}]})',
    )


def of_unknown_kind(name: str) -> RecordError:
    """What is wrong with a medium that nothing reads."""
    return RecordError(
        "unknown medium",
        f"{printable(name)}: a medium of an unknown kind ({ending(name) or 'no ending'}); convert it to PNG, JPEG, WebP or "
        "MP4",
    )


# -------------------------------------------------------------------------------------------------------------- records
def with_medium(record: Mapping, kind: str, medium: str | Path) -> Mapping:
    """A record that lies beside a medium: it gets the medium, unless it has parts, messages or media of its own."""
    return record if any(record.get(key) is not None for key in OWN_MEDIA) else {**record, kind: medium}


def wants_text(record: Mapping) -> bool:
    """Whether a record takes the text that lies beside it; null counts as absent."""
    return all(record.get(key) is None for key in GIVEN)


def with_text(record: Mapping, text: str) -> Mapping:
    """The record with the text that lies beside it: before boxes and elements a caption."""
    boxes = any(record.get(key) is not None for key in ("boxes", "elements"))
    return {**record, "caption" if boxes else "text": text}

"""Folders of texts, and of pictures and videos with captions beside them, as records (K2.5 §3.3)."""

import logging
import os
import stat
from collections.abc import Mapping
from typing import NamedTuple

from k25_jax.data.captions import (
    CAPTIONS,
    FOLDS,
    OTHER,
    OTHER_MEDIA,
    PLAIN,
    SYSTEM,
    TEXTS,
    caption_folders,
    captions_of,
    ending,
    is_named_as_caption,
    is_system_file,
    medium_kind,
    of_unknown_kind,
    printable,
    stem,
    wants_text,
    with_medium,
    with_text,
    without_medium,
)
from k25_jax.data.records import DataError, RecordError, Source, parse_record, read_bytes, read_text
from k25_jax.runtime.paths import AnyPath, is_remote, names, to_path, walk

logger = logging.getLogger(__name__)

NO_CAPTION, NO_MEDIUM, LINKED = "no caption", "JSON or caption alone", "link to a folder"
NAMED = 20  # pictures without a caption that the log names


class _Entry(NamedTuple):
    """A file that is a record, and its captions."""

    file: AnyPath
    captions: tuple[AnyPath, ...] = ()
    problem: RecordError | None = None


class Folder(Source):
    """All files below a folder, in order of their names: texts; images and videos with a caption beside them.

    The caption of `cat.png` is `cat.txt`, or `cat.json` with the rest of a record such as "caption", "ocr" or "boxes",
    or with a whole record; see `data.captions`. Links are followed within the folder; paths within records do not lead out
    of it. `path` may also be one file: the record that it belongs to.
    """

    def __init__(self, path: str):
        super().__init__()
        self._folder = to_path(path, "data.sources")
        self._entries: list[_Entry] = []
        self._media: list[str] = []  # all of them, by their paths below the folder
        self._alone: list[AnyPath] = []  # those without a caption
        if self._folder.is_dir():
            self._walk()
        elif self._folder.is_file():
            self._open_file(self._folder)
        else:
            raise DataError(f"data.sources: {path} is not a folder; set kind to what it is")

    def _walk(self):
        for folder, folders, files in walk(self._folder, onerror=self._not_readable):
            folders.sort()
            self.left_out[LINKED] += sum(os.path.islink(folder / name) for name in folders)
            below = os.path.relpath(folder, self._folder)
            system = {name for name in files if is_system_file(name if below == "." else f"{below}/{name}")}
            self.left_out[SYSTEM] += len(system)
            named_as_media = [name for name in folders if medium_kind(name)]
            self._collect(folder, sorted(set(files) - system), set(named_as_media))
        self._find_captions_alone()
        self.left_out[NO_CAPTION] = len(self._alone)
        self.left_out = +self.left_out
        for file in self._alone[:NAMED]:
            logger.warning("%s: left out, no caption in %s.txt or .json", printable(str(file)), printable(file.stem))

    def _not_readable(self, problem: OSError):
        self.left_out["folder that cannot be read"] += 1
        logger.warning("%s: left out, it cannot be read (%s)", problem.filename, problem.strerror)

    def _open_file(self, file: AnyPath):
        """Only what belongs to one file; a text without a medium is a text, as it was named itself."""
        if not (medium_kind(file.name) or ending(file.name) in TEXTS):
            raise DataError(f"data.sources: {file} is not a folder; set kind to what it is")
        self._folder = file.parent
        key = FOLDS[-1](stem(file.name))
        self._collect(self._folder, [name for name in names(file.parent) if FOLDS[-1](name).startswith(key)], set())
        self._entries = [entry for entry in self._entries if file in (entry.file, *entry.captions)]
        self.left_out.clear()
        if not self._entries:
            raise DataError(
                f"data.sources: {file} has no caption; write one beside it, {file.stem}.txt or {file.stem}.json"
            )

    def _collect(self, folder: AnyPath, names: list[str], folders: set[str]):
        """The records of one folder. `folders`: those in it that are named as media are."""
        captions = [name for name in names if ending(name) in CAPTIONS]
        below = os.path.relpath(folder, self._folder)
        self._media += [os.path.join(below, name) for name in names if medium_kind(name) or ending(name) in OTHER_MEDIA]
        media = [name for name in names if medium_kind(name)]
        others = [name for name in names if not medium_kind(name) and ending(name) not in PLAIN]
        found = captions_of([*media, *sorted(folders)], captions)
        used = {caption for own in found.values() for caption in own}
        unknown = captions_of(others, [name for name in captions if name not in used])
        for name in [*media, *sorted(folders & found.keys())]:
            if name in found:
                self._entries.append(_Entry(folder / name, tuple(folder / caption for caption in found[name])))
            else:
                self._alone.append(folder / name)
        for name in others:
            own = unknown.get(name, [])
            if own and (ending(name) in OTHER_MEDIA or any(ending(caption) != ".json" for caption in own)):
                paths = tuple(folder / caption for caption in own)
                self._entries.append(_Entry(folder / name, paths, of_unknown_kind(str(folder / name))))
                used.update(own)
            else:
                self.left_out[OTHER] += 1
        for name in names:
            if ending(name) in TEXTS and name not in used:
                self._entries.append(_Entry(folder / name))
            elif ending(name) in PLAIN and name not in used:
                self.left_out[NO_MEDIUM if ending(name) in CAPTIONS else OTHER] += 1

    def _find_captions_alone(self):
        """A text without a medium is a bad record where texts are captions."""
        alone = {
            number: os.path.join(os.path.relpath(entry.file.parent, self._folder), entry.file.name)
            for number, entry in enumerate(self._entries)
            if not entry.captions and ending(entry.file.name) == ".txt"
        }
        folders = caption_folders(self._media, alone.values())
        for number, name in alone.items():
            if os.path.dirname(name) in folders or is_named_as_caption(name):
                file = self._entries[number].file
                self._entries[number] = _Entry(file, problem=without_medium(str(file)))

    def __len__(self) -> int:
        return len(self._entries)

    def label(self, index: int) -> str:
        return printable(str(self._entries[index].file))

    def read(self, index: int) -> Mapping:
        entry = self._entries[index]
        file = self._inside(entry.file)
        if entry.problem is not None:
            raise RecordError(entry.problem.reason, str(entry.problem))
        if not entry.captions:
            return {"text": read_text(file)}
        record: Mapping = {}
        for caption in entry.captions:
            if ending(caption.name) == ".json":
                record = parse_record(read_bytes(self._inside(caption))) if not record else record
            elif wants_text(record):
                record = with_text(record, read_text(self._inside(caption)))
        return with_medium(record, medium_kind(entry.file.name), file)

    def _inside(self, file: AnyPath) -> AnyPath:
        """The regular file, or the one that a link to it leads to within the folder; raises RecordError."""
        if is_remote(file):
            return file
        name = printable(str(file))
        try:
            real = file.resolve() if stat.S_ISLNK(os.lstat(file).st_mode) else file
            if real is not file and not real.is_relative_to(self._folder.resolve()):
                raise RecordError("path", f"{name} is a link that leads out of {self._folder}; copy it there")
            if not stat.S_ISREG(os.stat(real).st_mode):
                raise RecordError("file", f"{name}: is no regular file")
        except RuntimeError:
            raise RecordError("path", f"{name}: a link that leads in a circle") from None
        except FileNotFoundError:
            reason = "missing" if os.path.islink(file) else "file"
            raise RecordError(reason, f"{name}: cannot be read (there is no such file)") from None
        except OSError as problem:
            raise RecordError("file", f"{name}: cannot be read ({problem.strerror})") from None
        return real

    def root(self, index: int) -> AnyPath:
        return self._entries[index].file.parent

    def files(self) -> list[AnyPath]:
        return [file for entry in self._entries for file in (entry.file, *entry.captions)]

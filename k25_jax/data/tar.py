"""WebDataset tar files as records: what lies under one name is a record (K2.5 §3.3)."""

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from k25_jax.data.archives import Archives
from k25_jax.data.captions import (
    CAPTIONS,
    FOLDS,
    IMAGES,
    OTHER_MEDIA,
    OWN_MEDIA,
    PLAIN,
    SYSTEM,
    VIDEOS,
    caption_folders,
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
from k25_jax.data.records import MAX_RECORD_BYTES, DataError, RecordError, decode_text, parse_record
from k25_jax.data.tar_headers import Damage, Directory, Entry, Link, Member, read_entries
from k25_jax.runtime.paths import AnyPath, Reader, read_range

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
MAX_LINKS = 40  # from link to link
LONE = "unknown medium beside a record"


class _Group(NamedTuple):
    """Members that share a stem, by the rest of their names; or what is wrong with this part of the archive."""

    stem: str
    members: dict[str, Member | RecordError]
    problem: RecordError | None = None
    is_caption: bool = False  # a text in a folder of captions, and no medium with it


class _Members(Mapping):
    """Names to bytes of one group; bytes are read when asked for."""

    def __init__(self, file: AnyPath, group: _Group):
        self._file, self._group = file, group

    def __getitem__(self, name: str) -> bytes:
        member = self._group.members[self._ending(name)]
        if isinstance(member, RecordError):
            raise RecordError(member.reason, str(member))
        if member.size > MAX_RECORD_BYTES:
            raise RecordError("too large", f"{name}: {member.size} bytes exceed {MAX_RECORD_BYTES}")
        try:
            data = read_range(self._file, member.size, member.offset)
        except OSError as problem:
            raise DataError(
                f"data.sources: {self._file} can no longer be read ({problem}); check the disk"
            ) from problem
        if len(data) < member.size:
            raise RecordError("truncated", f"{name}: the archive ends after {len(data)} of {member.size} bytes")
        return data

    def _ending(self, name: str) -> str:
        base = self._group.stem.rpartition("/")[2]
        return name.removeprefix(f"{self._group.stem}.").removeprefix(f"{base}.").lower()

    def __contains__(self, name) -> bool:
        return self._ending(name) in self._group.members

    def __iter__(self) -> Iterator[str]:
        return iter(self._group.members)

    def __len__(self) -> int:
        return len(self._group.members)


class TarFiles(Archives):
    """Tar files (one, a folder or a pattern) in which members that share a stem are a record.

    The stem ends at the first dot of the file's name. `cat.jpg` and `cat.txt` are a picture and its caption; `cat.json`
    is a record of `data.forms`, which may name members (`"image": "0.jpg"` for `cat.0.jpg`). Where captions have dots
    before their ending (`cat.0.jpg`, `cat.0.txt`; `cat.jpg.txt`) the stem ends at the last. Only the places of the members
    are held. Compressed archives are refused: they have no random access. Links are followed within the archive.
    """

    suffixes = (".tar",)

    def __init__(self, path: str):
        self._groups: list[list[_Group]] = []
        super().__init__(path)

    def open(self, file: AnyPath) -> int:
        try:
            with Reader(file) as archive:
                if archive.read_at(8, 0).startswith(COMPRESSED):
                    raise DataError(
                        f"data.sources: {file} is compressed, which allows no random access; decompress it to .tar"
                    )
                entries = list(read_entries(archive))
        except OSError as problem:
            raise DataError(f"data.sources: {file} cannot be read ({problem}); check its permissions") from problem
        named = [name for name, what in entries if not isinstance(what, (Damage, Directory))]
        self.left_out[SYSTEM] += sum(map(is_system_file, named))
        groups = _groups(entry for entry in _followed(entries) if not is_system_file(entry.name))
        if not any(group.members for group in groups):
            raise DataError(f"data.sources: {file} is no tar file, or holds no files; check the path and the kind")
        self.left_out[LONE] += sum(map(_unread, groups))
        self.left_out = +self.left_out
        self._groups.append(groups)
        return len(groups)

    def label(self, index: int) -> str:
        file, number = self.place(index)
        return printable(f"{self._files[file]}[{self._groups[file][number].stem}]")

    def root(self, index: int) -> Mapping[str, bytes]:
        file, number = self.place(index)
        return _Members(self._files[file], self._groups[file][number])

    def read(self, index: int) -> Mapping:
        file, number = self.place(index)
        group, members = self._groups[file][number], self.root(index)
        if group.problem is not None:
            raise RecordError(group.problem.reason, str(group.problem))
        record: Mapping = parse_record(members["json"]) if "json" in members else {}
        text = next((name for name in ("txt", "caption") if name in members), None)
        if text and wants_text(record):
            record = with_text(record, decode_text(members[text], text))
        media = [name for name in members if _kind(name)]
        if any(record.get(key) is not None for key in OWN_MEDIA):
            return record
        if not media:
            return _without_medium(record, group)
        if len(media) > 1:
            raise RecordError(
                "form", f"{len(media)} media and no parts or messages that name them: {list(members)[:8]}"
            )
        return with_medium(record, _kind(media[0]), media[0])


def _without_medium(record: Mapping, group: _Group) -> Mapping:
    """The record of a group without a picture or video that can be read; raises RecordError where it should have one."""
    for name, member in group.members.items():
        if not _is_plain(name):
            if isinstance(member, RecordError):
                raise RecordError(member.reason, str(member))
            raise of_unknown_kind(member.name)
    if group.is_caption and record.get("conversations") is None:
        raise without_medium(f"{group.stem}.{next(iter(group.members))}")
    if not record and not any(name in ("json", *(one[1:] for one in CAPTIONS)) for name in group.members):
        raise RecordError("form", f"neither text, nor JSON, nor a medium: {list(group.members)[:8]}")
    return record


def _is_plain(name: str) -> bool:
    return ending(f"_.{name}") in PLAIN


def _is_medium(name: str) -> bool:
    return ending(f"_.{name}") in IMAGES + VIDEOS + OTHER_MEDIA


def _kind(name: str) -> str:
    return medium_kind(f"_.{name}")


def _is_text(name: str) -> bool:
    return f".{name}" in CAPTIONS


def _unread(group: _Group) -> int:
    """How many media of unknown kinds lie beside one that is read, without JSON that may name them."""
    if "json" in group.members or not any(_kind(name) for name in group.members):
        return 0
    return sum(ending(f"_.{name}") in OTHER_MEDIA for name in group.members)


# --------------------------------------------------------------------------------------------------------------- groups
def _groups(entries: Iterable[Entry]) -> list[_Group]:
    """Members that share a stem, and the damaged places between them; the order is that of the archive."""
    groups: list[_Group] = []
    latest: dict[str, _Group] = {}
    for name, what in entries:
        if isinstance(what, Damage):
            groups.append(_Group(name, {}, what.problem))
            continue
        folder, _, base = name.rpartition("/")
        first, _, rest = base.partition(".")
        key = posixpath.normpath(posixpath.join(folder, first or base))
        group = latest.get(key)
        if group is None or rest.lower() in group.members:
            group = latest[key] = _Group(f"{folder}/{first}" if folder else first, {})
            groups.append(group)
        group.members[rest.lower()] = what
    groups = [part for group in groups for part in _split(group)]
    for fold in FOLDS[1:]:
        groups = _joined(groups, fold)
    media = [f"{group.stem}.{name}" for group in groups for name in group.members if _is_medium(name)]
    texts = [f"{group.stem}.txt" for group in groups if any(map(_is_text, group.members))]
    folders = caption_folders(media, texts)
    return [group._replace(is_caption=_is_caption(group, folders)) for group in groups]


def _is_caption(group: _Group, folders: set[str]) -> bool:
    alone = group.members and all(map(_is_plain, group.members)) and any(map(_is_text, group.members))
    return bool(alone) and (posixpath.dirname(group.stem) in folders or is_named_as_caption(f"{group.stem}.txt"))


def _split(group: _Group) -> list[_Group]:
    """The group in parts by the names' last dot, where captions have one before their ending."""
    names = list(group.members)
    if any(map(_is_text, names)) or not any(ending(name) in CAPTIONS for name in names):
        return [group]
    owned = {name for name in names if any(f"{name}{one}" in group.members for one in CAPTIONS)}
    parts: dict[str, dict[str, Member | RecordError]] = {}
    for name, member in group.members.items():
        inner, _, last = name.rpartition(".")
        parts.setdefault(name if name in owned else inner, {})[last] = member
    if len(parts) == 1 and owned:
        (name,) = owned
        return [_Group(".".join(filter(None, (group.stem, name.rpartition(".")[0]))), next(iter(parts.values())))]
    return [_Group(f"{group.stem}.{inner}" if inner else group.stem, members) for inner, members in parts.items()]


def _joined(groups: list[_Group], fold) -> list[_Group]:
    """Groups with media alone and with captions alone made one where `fold` makes their names alike, and no others'."""
    media: dict[str, list[_Group]] = {}
    texts: dict[str, list[_Group]] = {}
    for group in groups:
        if group.members:
            has_text, has_rest = any(map(_is_text, group.members)), not all(map(_is_plain, group.members))
            if has_text != has_rest:
                side = texts if has_text else media
                name = posixpath.normpath(group.stem)
                name = stem(name) if has_text and is_named_as_caption(f"{name}.txt") else name  # of cat.png.txt, cat
                side.setdefault(fold(name), []).append(group)
    gone = set()
    for key in media.keys() & texts.keys():
        if len(media[key]) == len(texts[key]) == 1 and not media[key][0].members.keys() & texts[key][0].members.keys():
            media[key][0].members.update(texts[key][0].members)
            gone.add(id(texts[key][0]))
    return [group for group in groups if id(group) not in gone]


# ---------------------------------------------------------------------------------------------------------------- links
def _followed(entries: list[Entry]) -> Iterator[Entry]:
    """The entries with links replaced by the members that they lead to, or by what is wrong with them; no folders."""
    known: dict[str, Member | Link | Directory | RecordError] = {}
    if any(isinstance(entry.what, Link) for entry in entries):
        entries = [_hard_link_followed(entry, known) for entry in entries]
    folders = {posixpath.dirname(name) for name in known}
    for name, what in entries:
        if isinstance(what, Link):
            what = _symbolic_link_followed(name, what, known, folders)
        if not isinstance(what, Directory):
            yield Entry(name, what)


def _hard_link_followed(entry: Entry, known: dict) -> Entry:
    """A hard link is what was under its target's name before; what each name stands for is noted in `known`."""
    name, what = entry
    if isinstance(what, Damage):
        return entry
    if isinstance(what, Link) and what.hard:
        target = posixpath.normpath(what.target)
        what = known.get(target) or _broken(name, what.target, target, "no earlier member has this name")
    known[posixpath.normpath(name)] = what
    return Entry(name, what)


def _symbolic_link_followed(name: str, link: Link, known: dict, folders: set[str]):
    what: Member | Link | Directory | RecordError = link
    for _ in range(MAX_LINKS):
        if not isinstance(what, Link):
            return what
        target = posixpath.normpath(posixpath.join(posixpath.dirname(what.name), what.target))
        if target in folders and target not in known:
            return Directory(target)
        what = known.get(target) or _broken(name, link.target, target, "no member has this name")
    return RecordError("path", f"{name[:200]}: a link to {link.target[:200]!r}, which leads in a circle")


def _broken(name: str, given: str, target: str, missing: str) -> RecordError:
    if target.startswith(("/", "..")):
        return RecordError("path", f"{name[:200]}: a link to {given[:200]!r}, which leads out of the archive")
    return RecordError("missing", f"{name[:200]}: a link to {given[:200]!r}; {missing}")

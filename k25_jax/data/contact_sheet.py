"""A picture of packed rows as training sees them: documents, images, text and what of it is learnt (K2.5 §3.3)."""

import bisect
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from k25_jax.config import K25Config
from k25_jax.data.packing import Batch, batch_stats
from k25_jax.data.pipeline import make_pipeline
from k25_jax.data.statistics import Reader
from k25_jax.text.tokenizer import Tokenizer, load_tokenizer

WIDTH, MARGIN, PAD = 1680, 48, 18
COLUMNS, MOST_ROWS = 2, 12  # rows of the batch beside each other, and in all: a picture is read at one glance
BODY = 290  # pixels of height for a row's tokens; what does not fit is left out, and said
THUMBNAIL = (200, 84)  # width and height at most
PAPER, CARD, INK, FAINT, EDGE = "#f5f4f0", "#ffffff", "#22262e", "#8a8f99", "#e3e1da"
LEARNT, LEARNT_INK = "#ffd9a0", "#6b3d00"
CONTEXT, CONTEXT_INK = "#eceef2", "#4a5160"
MEDIA, MEDIA_INK = "#7fb2d9", "#1d4e74"
PADDING, HATCH = "#e9e8e4", "#d6d4ce"
DOCUMENTS = ("#33658a", "#86a83c", "#c8553d", "#7b5ea7", "#2a9d8f", "#b5838d")


class Span(NamedTuple):
    """Neighbouring tokens of one document that look the same."""

    row: int
    kind: str  # text | special | media | padding
    first: int
    last: int  # one past its last token
    learnt: bool
    segment: int


# ---------------------------------------------------------------------------------------------------------------- spans
def learnt_BL(batch: Batch) -> np.ndarray:
    """bool: whether the loss counts the prediction of this token."""
    out = np.zeros(batch.tokens_BL.shape, bool)
    out[:, 1:] = (batch.loss_weights_BL[:, :-1] > 0) & (batch.segments_BL[:, 1:] == batch.segments_BL[:, :-1])
    return out


def clips_of_features(batch: Batch, group: int) -> np.ndarray:
    """The clip that each vision token of the features flattened to [P * M] belongs to; 0: none."""
    packs, slots = batch.vision.slots_PN.shape
    out = np.zeros((packs, slots // group + 1), np.int64)
    for number in range(packs):
        segments = batch.vision.segments_PN[number]
        out[number, batch.vision.slots_PN[number] // group] = np.where(segments > 0, segments + number * (slots + 1), 0)
    return out[:, :-1].reshape(-1)


def spans(batch: Batch, row: int, special: frozenset[int], group: int = 4) -> list[Span]:
    """The row from its first token to its last; each special token and each clip by itself."""
    tokens, segments, media = batch.tokens_BL[row], batch.segments_BL[row], batch.media_BL[row]
    clips = np.append(clips_of_features(batch, group), 0)[media]  # -1: none
    learnt = learnt_BL(batch)[row]
    is_special = np.isin(tokens, list(special)) & (media < 0)
    kinds = np.where(segments == 0, "padding", np.where(media >= 0, "media", np.where(is_special, "special", "text")))
    change = np.ones(len(tokens), bool)
    change[1:] = (kinds[1:] != kinds[:-1]) | (segments[1:] != segments[:-1]) | (kinds[1:] == "special")
    change[1:] |= (learnt[1:] != learnt[:-1]) & (kinds[1:] == "text")
    change[1:] |= clips[1:] != clips[:-1]
    firsts = [*np.flatnonzero(change).tolist(), len(tokens)]
    return [
        Span(row, str(kinds[a]), a, b, bool(learnt[a]), int(segments[a]))
        for a, b in zip(firsts, firsts[1:], strict=False)
    ]


def clip_frames(batch: Batch, first_token: int, config: K25Config) -> list[np.ndarray]:
    """The frames, uint8 RGB [h, w, 3], of the clip whose first vision token has this index in `media_BL`."""
    vision, pack = config.vision, batch.vision
    slots = pack.patches_PNC.shape[1]
    number, token = divmod(first_token, slots // vision.group)
    slot = np.flatnonzero(pack.slots_PN[number] // vision.group == token)[0]
    where = np.flatnonzero(pack.segments_PN[number] == pack.segments_PN[number, slot])
    coords = pack.coords_PN5[number, where]
    rows, columns = coords[0, 3:]
    side = vision.patch_size
    patches = pack.patches_PNC[number, where].reshape(-1, rows, columns, 3, side, side)
    return [frame.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3) for frame in patches]


# -------------------------------------------------------------------------------------------------------------- drawing
class _Item(NamedTuple):
    """Something to draw in a line of a row."""

    width: int
    height: int
    span: Span  # of the document whose number it is, where it has no text or image of its own
    text: str = ""
    image: Image.Image | None = None
    newline: bool = False  # a line ends after it
    badge: bool = False  # the number of a document
    offset: int = 0  # characters of the span before it


class ContactSheet:
    """Draws rows below each other."""

    def __init__(self, batch: Batch, model: K25Config, tokenizer: Tokenizer):
        self._batch, self._model, self._tokenizer = batch, model, tokenizer
        self._special = frozenset(tokenizer.special.values())
        self._names = {id_: name.strip("<|>") for name, id_ in tokenizer.special.items()}
        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
        self._mono = ImageFont.truetype(folder / "DejaVuSansMono.ttf", 15)
        self._small = ImageFont.truetype(folder / "DejaVuSans.ttf", 12)
        self._plain = ImageFont.truetype(folder / "DejaVuSans.ttf", 15)
        self._bold = ImageFont.truetype(folder / "DejaVuSans-Bold.ttf", 15)
        self._title = ImageFont.truetype(folder / "DejaVuSans-Bold.ttf", 26)

    def draw(self, title: str, rows: Sequence[int]) -> Image.Image:
        """The whole picture: at most MOST_ROWS of the rows, and how many are left out."""
        shown = list(rows)[:MOST_ROWS]
        columns = min(COLUMNS, len(shown)) or 1
        width = (WIDTH - 2 * MARGIN - (columns - 1) * PAD) // columns
        cards = [self._card(row, width) for row in shown]
        lines = [cards[i : i + columns] for i in range(0, len(cards), columns)]
        head = self._head(title, len(rows) - len(shown))
        height = head.height + sum(max(card.height for card in line) + PAD for line in lines) + MARGIN - PAD
        out = Image.new("RGB", (WIDTH, height), PAPER)
        out.paste(head, (0, 0))
        y = head.height
        for line in lines:
            for column, card in enumerate(line):
                out.paste(card, (MARGIN + column * (width + PAD), y))
            y += max(card.height for card in line) + PAD
        return out

    def _head(self, title: str, left_out: int) -> Image.Image:
        out = Image.new("RGB", (WIDTH, 150), PAPER)
        draw = ImageDraw.Draw(out)
        draw.text((MARGIN, 34), title, INK, self._title)
        stats = batch_stats(self._batch)
        rows, length = self._batch.tokens_BL.shape
        text = (
            f"{rows} rows of {length} tokens   ·   {stats['documents']} documents   ·   {stats['clips']} clips   ·   "
            f"loss on {stats['loss_tokens'] / max(1, stats['tokens']):.0%} of the tokens   ·   padding: "
            f"{stats['waste_tokens']:.1%} of tokens, {stats['waste_patches']:.1%} of patches"
        )
        draw.text((MARGIN, 74), text, CONTEXT_INK, self._plain)
        x = MARGIN
        for name, colour in (("learnt", LEARNT), ("context", CONTEXT), ("vision", MEDIA), ("padding", PADDING)):
            draw.rounded_rectangle((x, 110, x + 26, 126), 4, colour, EDGE)
            draw.text((x + 34, 109), name, CONTEXT_INK, self._plain)
            x += 60 + int(self._plain.getlength(name))
        if left_out:
            draw.text((x, 109), f"{left_out} more rows are not shown", FAINT, self._plain)
        return out

    def _card(self, row: int, width: int) -> Image.Image:
        parts = spans(self._batch, row, self._special, self._model.vision.group)
        lines, left_out = self._lines(parts, width - 2 * PAD)
        heights = [_height(line) for line in lines]
        out = Image.new("RGB", (width, 70 + sum(heights) + (24 if left_out else 0) + 10), PAPER)
        draw = ImageDraw.Draw(out)
        draw.rounded_rectangle((0, 0, width - 1, out.height - 1), 10, CARD, EDGE)
        used = int(np.count_nonzero(self._batch.segments_BL[row]))
        counted = int(learnt_BL(self._batch)[row].sum())
        documents = int(self._batch.segments_BL[row].max())
        draw.text((PAD, 12), f"row {row}", INK, self._bold)
        text = (
            f"{documents} documents   ·   {used} of {len(self._batch.segments_BL[row])} tokens   ·   {counted} learnt"
        )
        draw.text((PAD + 70, 12), text, FAINT, self._plain)
        self._bar(draw, parts, (PAD, 38, width - PAD, 54))
        y = 66
        for line, height in zip(lines, heights, strict=True):
            x = PAD
            for item in line:
                self._draw_item(out, draw, item, x, y + (height - 6 - item.height) // 2)
                x += item.width
            y += height
        if left_out:
            draw.text((PAD, y + 2), f"{left_out:,d} more tokens are not shown", FAINT, self._small)
        return out

    def _bar(self, draw: ImageDraw.ImageDraw, parts: Sequence[Span], box: tuple[int, int, int, int]):
        """The row in proportion: what is learnt, context, media and padding, with a notch between documents."""
        left, top, right, bottom = box
        scale, before = (right - left) / self._batch.tokens_BL.shape[1], 0
        for span in parts:
            x1, x2 = left + span.first * scale, left + span.last * scale
            colour = {"media": MEDIA, "padding": PADDING}.get(span.kind, "#f5ab4a" if span.learnt else "#c9ced8")
            draw.rectangle((x1, top, x2, bottom), colour)
            if span.segment != before and span.segment:
                draw.rectangle((x1 - 1, top - 3, x1 + 1, bottom + 3), DOCUMENTS[(span.segment - 1) % len(DOCUMENTS)])
            before = span.segment

    def _lines(self, parts: Sequence[Span], width: int) -> tuple[list[list[_Item]], int]:
        """The lines of items that fit, and the number of tokens that found no place in them."""
        lines, line, x, height = [], [], 0, 0
        for item in [*self._items(parts, width), None]:
            if line and (item is None or line[-1].newline or x + item.width > width):
                height += _height(line)
                if height > BODY:
                    return lines, self._tokens_from(line[0])
                lines.append(line)
                line, x = [], 0
            if item is not None:
                line.append(item)
                x += item.width
        return lines, 0

    def _tokens_from(self, item: _Item) -> int:
        """Tokens of documents from this item to the end of its row."""
        span = item.span
        tokens = self._batch.tokens_BL[span.row, span.first : span.last]
        before = 0
        if item.offset:
            counts = range(len(tokens) + 1)
            before = bisect.bisect_left(counts, item.offset, key=lambda n: len(self._tokenizer.decode(tokens[:n])))
        return int(np.count_nonzero(self._batch.segments_BL[span.row, span.first + before :]))

    def _items(self, parts: Sequence[Span], width: int) -> Iterator[_Item]:
        advance, before = self._mono.getlength("M"), 0
        for span in parts:
            if span.segment != before and span.segment:
                yield _Item(32, 24, span, str(span.segment), badge=True)
            before = span.segment
            tokens = self._batch.tokens_BL[span.row, span.first : span.last]
            if span.kind == "media":
                image = self._thumbnail(span)
                yield _Item(image.width + 8, image.height + 4, span, image=image)
            elif span.kind == "special":
                name = self._names.get(int(tokens[0]), "?")
                yield _Item(int(self._small.getlength(name)) + 14, 20, span, name)
            elif span.kind == "padding":
                text = f"{span.last - span.first} padding"
                yield _Item(min(width, int(self._small.getlength(text)) + 80), 22, span, text)
            else:
                for piece, offset, newline in _pieces(self._tokenizer.decode(tokens)):
                    yield _Item(round(len(piece) * advance), 22, span, piece, newline=newline, offset=offset)

    def _thumbnail(self, span: Span) -> Image.Image:
        """The clip: a picture, or its frames side by side."""
        frames = clip_frames(self._batch, int(self._batch.media_BL[span.row, span.first]), self._model)
        most, high = THUMBNAIL[0] // len(frames), THUMBNAIL[1]
        scale = min(most / frames[0].shape[1], high / frames[0].shape[0], 2.0)
        size = (max(1, round(frames[0].shape[1] * scale)), max(1, round(frames[0].shape[0] * scale)))
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        out = Image.new("RGB", (len(frames) * (size[0] + 2) + 2, size[1] + 4), MEDIA)
        for number, frame in enumerate(frames):
            out.paste(Image.fromarray(frame).resize(size, how), (2 + number * (size[0] + 2), 2))
        return out

    def _draw_item(self, out: Image.Image, draw: ImageDraw.ImageDraw, item: _Item, x: int, y: int):
        span, box = item.span, (x, y, x + item.width, y + item.height)
        if item.badge:
            colour = DOCUMENTS[(int(item.text) - 1) % len(DOCUMENTS)]
            draw.rounded_rectangle((x + 3, y + 1, x + 27, y + 22), 6, colour)
            draw.text((x + 15, y + 12), item.text, "#ffffff", self._small, anchor="mm")
        elif item.image is not None:
            out.paste(item.image, (x + 4, y + 2))
        elif span.kind == "padding":
            draw.rectangle(box, PADDING)
            for offset in range(0, item.width - item.height, 8):
                draw.line((x + offset, y + item.height, x + offset + item.height, y), HATCH)
            draw.text((x + item.width / 2, y + 11), item.text, FAINT, self._small, anchor="mm")
        elif span.kind == "special":
            inner = (x + 2, y + 1, x + item.width - 3, y + item.height - 1)
            draw.rounded_rectangle(inner, 5, LEARNT if span.learnt else CARD, "#d8a860" if span.learnt else EDGE)
            draw.text((x + item.width / 2, y + 10), item.text, LEARNT_INK if span.learnt else FAINT, self._small,
                      anchor="mm")  # fmt: skip
        else:
            draw.rectangle(box, LEARNT if span.learnt else CONTEXT)
            draw.text((x, y + 3), item.text, LEARNT_INK if span.learnt else CONTEXT_INK, self._mono)


def _height(line: Sequence[_Item]) -> int:
    return max(item.height for item in line) + 6


def _pieces(text: str) -> Iterator[tuple[str, int, bool]]:
    """Words with the space after them, so that lines break between words; where each begins; whether a line ends there."""
    for match in re.finditer(r"\n|[^\s]{1,60}[^\S\n]{0,8}|[^\S\n]{1,8}", text):
        word = match[0]
        yield ("↵" if word == "\n" else word.replace("\t", "  ")), match.start(), word == "\n"


def write_sheet(path: Path, reader: Reader, rows: int) -> Path:
    """Draw the first `rows` rows of the first batches of the configuration; returns the path. Raises DataError."""
    data = dataclasses.replace(reader.data, sources=reader.sources, batch_size=max(1, rows), lanes=1)
    iterator = make_pipeline(data, reader.model, steps=1)
    try:
        batch = next(iterator)
    finally:
        iterator.close()
    names = [source.path for source in reader.sources]
    title = "Packed samples of " + ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    sheet = ContactSheet(batch, reader.model, load_tokenizer(data.tokenizer))
    sheet.draw(title, range(rows)).save(path)
    return path

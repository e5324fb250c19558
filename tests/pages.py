"""A page of HTML as a test looks at it."""

import html.parser


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    VOID = {"meta", "img", "link", "br", "input", "!doctype"}

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        """Note it."""
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        """It closes the last one."""
        assert self._open.pop() == tag

    def handle_data(self, data):
        """All text but rules of style."""
        if self._open[-1:] != ["style"]:
            self.text += data


def needs_nothing_else(text: str) -> bool:
    """Whether a page has no script, no link, no handler, and every address in it is an image's own bytes."""
    page = Page(text)
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    handlers = [name for _, name, _ in page.attributes if name.startswith("on")]
    foreign = {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    inside = all(source.startswith("data:image/png;base64,") for source in sources)
    return inside and not foreign and not handlers and not any(word in text for word in ("@import", "url("))

"""Reads an HTML page as far as tests need it."""

from html.parser import HTMLParser

_VOID = {"meta", "img", "link", "br", "hr", "input"}


class Outline(HTMLParser):
    """All tags in order, those that were not closed, and what pictures show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name == "src"]
        assert not [v for name, v in attributes if name == "href" and "://" in v]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

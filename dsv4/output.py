# SPDX-License-Identifier: Apache-2.0
"""Answers on a screen or in a pipe, as they come."""

import json
import os
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from dsv4.answer import Event

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def has_colour(file: TextIO) -> bool:
    """Whether styles mean something there and are wanted: a terminal, no NO_COLOR, not "dumb"."""
    return (file.isatty() and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") not in (None, "", "dumb"))


class Output:
    """Text as it comes; reasoning dimmed where there is colour, set apart by lines elsewhere."""

    def __init__(self, file: TextIO, hidden: bool = False) -> None:
        self.file = file
        self.hidden = hidden
        self.styled = has_colour(file)
        self.kind = "text"
        self.last = "\n"
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="backslashreplace")

    def show(self, event: "Event") -> None:
        """A piece of an answer."""
        text = event.text
        if event.tool_call is not None:
            text = json.dumps(event.tool_call["function"], ensure_ascii=False) + "\n"
        if self.hidden or not text:
            return
        if event.kind != self.kind:
            self._switch(event.kind)
        self.file.write(text)
        self.file.flush()
        self.last = text[-1]

    def _switch(self, kind: str) -> None:
        if self.last != "\n":
            self.file.write("\n")
        if self.styled:
            self.file.write(DIM if kind == "reasoning" else PLAIN)
        elif "reasoning" in (kind, self.kind):
            self.file.write("<think>\n" if kind == "reasoning" else "</think>\n")
        self.kind = kind
        self.last = "\n"

    def end(self) -> None:
        """End the last line, in plain text."""
        if self.kind == "reasoning":
            self._switch("text")
        elif self.last != "\n":
            self.file.write("\n")
            self.last = "\n"
        self.file.flush()

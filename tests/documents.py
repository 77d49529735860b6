"""Reads the documents: blocks of code, links, headings. For the tests of what they promise."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
]

FENCE = re.compile(
    r"^(?:<!-- (?P<how>parse only|run with): (?P<what>.*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    """A fenced block. A comment before it may say why it is only parsed, or what small thing it runs with."""

    page: Path
    line: int
    language: str
    text: str
    parse_only: str = ""
    instead: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        how, what = match["how"], match["what"] or ""
        if match["language"] in languages:
            found.append(
                Block(
                    page,
                    text[: match.start("text")].count("\n") + 1,
                    match["language"],
                    match["text"],
                    what if how == "parse only" else "",
                    dict(pair.strip().split("=", 1) for pair in what.split(", ")) if how == "run with" else {},
                )
            )
    return found


def commands(shell: str) -> Iterator[list[str]]:
    """The commands of a shell block as words: lines joined, comments and variables gone, cut at && and pipes."""
    for line in re.sub(r" \$\w+", "", shell).replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        for word in lexer:
            if set(word) <= set("&|;"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def slim_arguments(words: list[str]) -> list[str] | None:
    """What a command hands to slim: `slim ...`, `.venv/bin/slim ...`, `torchrun ... -m slimcli ...`; None if nothing."""
    if words[0] == "slim" or words[0].endswith("/slim"):
        return words[1:]
    return words[words.index("slimcli") + 1 :] if "slimcli" in words and "-m" in words else None


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def links(page: Path) -> list[str]:
    """Targets of the page's links and pictures that are not on the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    return [link for link in found if not re.match(r"https?://|mailto:", link)]


def anchors(page: Path) -> set[str]:
    """The names by which headings can be linked to, as GitHub and mkdocs both make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {re.sub(r" +", "-", title.strip()) for title in plain}


def inline_commands(page: Path) -> Iterator[str]:
    """`slim ...` in running text, without those that only name a form (`slim report [RUN...]`)."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for code in re.findall(r"`(slim [^`]+)`", text.replace("\n", " ")):
        if "..." not in code:
            yield code

"""Check the wording of docs, docstrings, comments, messages, templates and test names.

Each problem is one line on standard output, `file:line: problem`; the exit code is 1 if there is one. Run it from the
project's root, on all files or on those given as arguments: `python tools/check_prose.py [FILE ...]`.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PATTERNS = (
    "*.md", ".env.example", ".pre-commit-config.yaml", "Dockerfile", "Makefile", "compose.yaml", "pyproject.toml",
    "bench/**/*.py", "deploy/*.sh", "docs/**/*.md", "migrations/*.sql", "opsentry/**/*.css", "opsentry/**/*.html",
    "opsentry/**/*.js", "opsentry/**/*.py", "opsentry/**/*.sql", "opsentry/**/*.txt", "tests/**/*.py", "tools/*.py",
)  # fmt: skip
# These two hold the banned phrases themselves.
EXEMPT = frozenset({"tools/check_prose.py", "tests/test_prose.py"})
BANNED_PHRASES = (
    "anew", "whoever", "whatever comes", "so many", "so long", "is told", "are told", "be told", "goes on",
    "stands still", "comes to its end",
)  # fmt: skip
MAX_SENTENCE_WORDS = 40

_BANNED = re.compile(rf"\b(?:{'|'.join(BANNED_PHRASES)})\b".replace(" ", r"\s+"), re.IGNORECASE)
# A sentence begins where a paragraph, a list item or a table cell begins, and after the end of another sentence.
_SENTENCE = re.compile(
    r"(?:^|(?<=[.!?:]\s)|(?<=[.!?][)\"'*_`]\s))\S(?:.*?)(?:[.!?](?=[)\"'*_`]*(?:\s|$))|$)", re.DOTALL
)
_RELATIVE = re.compile(r"[(\"'*_]*(?:What|Who)\s")
_COMMENT = re.compile(r"(?:^\s*|\s\s)#(?!!)[ :]?(.*)$")


class Passage(NamedTuple):
    """A run of prose: a paragraph, a docstring's paragraph, a comment, a table cell, a literal.

    Attributes:
        line: Line of the file on which `text` begins, counted from 1.
        text: The prose, with its line breaks; inline code is still in it.
        is_prose: Whether it consists of sentences. False for code and data: only banned phrases are looked for there.
    """

    line: int
    text: str
    is_prose: bool = True


class Problem(NamedTuple):
    """One finding, on a line counted from 1."""

    line: int
    text: str


def check(name: str, source: str) -> list[Problem]:
    """Return the problems of one file, in the order of its lines.

    Args:
        name: The file's path from the project's root, with `/`. Its ending decides how the file is read.
        source: The file's text.
    """
    in_docs = name.endswith(".md")
    problems = [problem for passage in _passages(name, source) for problem in _check_passage(passage, in_docs=in_docs)]
    return sorted(set(problems))


def _check_passage(passage: Passage, *, in_docs: bool) -> Iterator[Problem]:
    for match in _BANNED.finditer(passage.text):
        yield Problem(_line_at(passage, match.start()), f'banned: "{" ".join(match.group().split())}"')
    if not passage.is_prose:
        return
    for match in _SENTENCE.finditer(_without_code(passage.text)):
        sentence, line = match.group(), _line_at(passage, match.start())
        if _RELATIVE.match(sentence) and not sentence.rstrip(")\"'*_`").endswith("?"):
            yield Problem(line, f'sentence begins with "{sentence.split()[0]}" and is no question')
        words = sum(1 for word in sentence.split() if any(map(str.isalnum, word)))
        if in_docs and words > MAX_SENTENCE_WORDS:
            yield Problem(line, f"sentence of {words} words, at most {MAX_SENTENCE_WORDS} are allowed")


def _line_at(passage: Passage, offset: int) -> int:
    return passage.line + passage.text.count("\n", 0, offset)


def _without_code(text: str) -> str:
    """Replace inline code, and the targets of links, by as many characters that are one word and end no sentence."""
    text = re.sub(r"`[^`]*`", lambda match: re.sub(r"[^\n]", "x", match.group()), text)
    return re.sub(r"\]\([^)\s]*\)", lambda match: "_" * len(match.group()), text)


def _passages(name: str, source: str) -> Iterator[Passage]:
    if name.endswith(".py"):
        yield from _python(source, in_tests=name.startswith("tests/"))
    elif name.endswith(".md"):
        yield from _markdown(source)
    elif name.endswith((".html", ".txt")):
        yield from _template(source)
    else:
        yield Passage(1, source, is_prose=False)
        yield from _comments(source, r"(?:^|\s)--\s?(.*)$" if name.endswith(".sql") else _COMMENT.pattern)


def _python(source: str, *, in_tests: bool) -> Iterator[Passage]:
    in_literals: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            last = node.end_lineno or node.lineno
            in_literals.update(range(node.lineno + 1, last + 1))
            # Escaped line breaks and joined literals have no line of their own: the literal's first one stands for all.
            is_verbatim = node.value.count("\n") == last - node.lineno
            for passage in _paragraphs(node.lineno, node.value):
                # A test's literals are mostly data, as a user would enter them.
                yield passage._replace(line=passage.line if is_verbatim else node.lineno, is_prose=not in_tests)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            words = node.name.removeprefix("test_").replace("_", " ")
            yield Passage(node.lineno, words[:1].upper() + words[1:])
    yield from _comments(source, _COMMENT.pattern, skip=in_literals)


def _comments(source: str, pattern: str, *, skip: Iterable[int] = ()) -> Iterator[Passage]:
    """Yield comments; those on consecutive lines are one passage."""
    comment, skipped, begun, lines = re.compile(pattern), set(skip), 0, list[str]()
    for number, line in enumerate([*source.split("\n"), ""], start=1):
        match = None if number in skipped else comment.search(line)
        if match is not None:
            begun = begun if lines else number
            lines.append(match.group(1))
        elif lines:
            yield from _paragraphs(begun, "\n".join(lines))
            lines = []


def _markdown(source: str) -> Iterator[Passage]:
    """Yield paragraphs, list items, table cells and headings; code blocks are searched for banned phrases only."""
    prose: list[str] = []
    fenced = False
    for number, line in enumerate(source.split("\n"), start=1):
        is_fence = line.lstrip().startswith("```")
        fenced ^= is_fence
        if is_fence or fenced:
            yield Passage(number, line, is_prose=False)
        prose.append("" if is_fence or fenced else line)
    for number, block in _blocks(prose):
        if block.startswith("|"):
            yield from (Passage(number, cell.strip()) for cell in re.split(r"(?<!\\)\|", block) if cell.strip(" -:"))
        else:
            yield Passage(number, re.sub(r"^\s*(?:#+|[-*]|\d+\.|>)\s+", "", block))


def _blocks(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield each paragraph, list item, heading and table row with the number of its first line."""
    begun, block = 0, list[str]()
    for number, line in enumerate([*lines, ""], start=1):
        stands_alone = line.startswith(("#", "|"))
        if block and (not line.strip() or stands_alone or re.match(r"\s*(?:[-*]|\d+\.)\s", line)):
            yield begun, "\n".join(block)
            block = []
        if stands_alone:
            yield number, line
        elif line.strip():
            begun = begun if block else number
            block.append(line)


def _template(source: str) -> Iterator[Passage]:
    """Yield the words between tags. Jinja's expressions count as words, its statements and block tags as breaks."""
    source = re.sub(r"</?(?:a|b|br|code|em|i|span|strong|time)\b[^>]*>", lambda m: "\n" * m.group().count("\n"), source)
    breaks = r"<(style|script)\b.*?</\1>|<[^>]*>|\{%.*?%\}|\{#|#\}"
    marked = re.sub(breaks, lambda match: "\n" * match.group().count("\n") + "\0", source, flags=re.DOTALL)
    line = 1
    for part in marked.split("\0"):
        yield from _paragraphs(line, re.sub(r"\{\{.*?\}\}", "x", part))
        line += part.count("\n")


def _paragraphs(line: int, text: str) -> Iterator[Passage]:
    for part in re.split(r"(\n\s*\n)", text):
        if part.strip():
            lead = len(part) - len(part.lstrip())
            yield Passage(line + part.count("\n", 0, lead), part.strip())
        line += part.count("\n")


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Print the problems of the given files, or of all below `root`; return the exit code."""
    given = [Path(argument).resolve() for argument in arguments]
    paths = given or sorted({path for pattern in PATTERNS for path in root.glob(pattern)})
    problems = 0
    for path in paths:
        name = path.relative_to(root).as_posix()
        if name in EXEMPT:
            continue
        for problem in check(name, path.read_text(encoding="utf-8")):
            print(f"{name}:{problem.line}: {problem.text}")
            problems += 1
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

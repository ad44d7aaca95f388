"""Long documents for the search and for the proof, and the deterministic split between the two.

A document belongs to one side as a whole; what the search reads is never evaluated on. Documents come from files,
folders, JSON lines, a `datasets` name, or `stdlib`: texts that every Python installation has.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import UsageError, one_line, refuse

SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".html", ".jsonl")
TEXT_FIELDS = ("text", "content", "document")
SHORT_PARAGRAPH = 60  # letters; headings and one-line examples may well be the same by chance
DATASET_ROWS = 2000  # read of a data set, from its beginning

# Documents of the standard library, best first: prose and code, no tables of data. A name that ends in a slash is a
# package, its modules joined. No text appears twice, on one side or on both.
TOPICS_FIRST, TOPICS_SECOND = "pydoc topics, first half", "pydoc topics, second half"
STDLIB_HELDOUT = (
    *(TOPICS_FIRST, "argparse.py", "tarfile.py", "subprocess.py", "ipaddress.py", "pickle.py", "mailbox.py"),
    *("asyncio/", "multiprocessing/", "http/"),
)
STDLIB_SEARCH = (
    *(
        TOPICS_SECOND,
        "_pydecimal.py",
        "inspect.py",
        "typing.py",
        "zipfile.py",
        "difflib.py",
        "pydoc.py",
        "_pyio.py",
        "enum.py",
    ),
    *("email/", "xml/", "logging/"),
)


@dataclass(frozen=True)
class Document:
    """A text and where it is from."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Window:
    """A stretch of a document: what one evaluation reads.

    Attributes:
        offset: first token of the stretch, in tokens of the document.
        tokens: ids; one more at the front where the tokenizer marks a beginning.
        sha256: of the document's text.
    """

    document: str
    sha256: str
    document_tokens: int
    offset: int
    tokens: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.document}@{self.offset}"

    def describe(self) -> dict[str, Any]:
        """Return what names this window beyond doubt; JSON."""
        fields = {name: value for name, value in asdict(self).items() if name != "tokens"}
        ids = hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest()
        return {**fields, "length": len(self.tokens), "tokens_sha256": ids}


@dataclass(frozen=True)
class Split:
    """Windows of disjoint documents."""

    search: tuple[Window, ...]
    heldout: tuple[Window, ...]

    def describe(self) -> dict[str, Any]:
        return {
            "search": [window.describe() for window in self.search],
            "heldout": [window.describe() for window in self.heldout],
        }


def split(
    tokenizer: Any,
    sources: Iterable[str],
    length: int,
    search: int = 2,
    heldout: int = 2,
    windows_per_document: int = 1,
    heldout_sources: Iterable[str] | None = None,
    progress: Callable[[str], None] = lambda note: None,
    required: Sequence[str] = ("search", "heldout"),
) -> Split:
    """Choose the documents of both sides.

    Documents shorter than `length` tokens are left out, and a text that appears twice counts once. They are taken in
    the order of the hashes of their texts (`stdlib`: of its two lists), in turn for the held-out side and the search.

    Args:
        sources: see `documents`; both sides come from here where `heldout_sources` is None.
        length: tokens of every window.
        search, heldout: documents wanted on each side; fewer where there are fewer, but at least one.
        windows_per_document: windows taken from a document where it is long enough, one after the other.
        required: the sides that must have a document.

    Raises:
        UsageError: fewer than one document for a side that must have one.
    """
    sources = tuple(sources)
    heldout_sources = None if heldout_sources is None else tuple(heldout_sources)
    if heldout_sources is None and sources == ("stdlib",):
        ordered = {"search": stdlib(STDLIB_SEARCH), "heldout": stdlib(STDLIB_HELDOUT)}
    elif heldout_sources is None:
        every = _by_content(documents(sources))
        ordered = {"heldout": iter(every), "search": iter(every)}
    else:
        ordered = {
            "search": iter(_by_content(documents(sources))),
            "heldout": iter(_by_content(documents(heldout_sources, "--heldout-text"))),
        }
    chosen: dict[str, list[Window]] = {"heldout": [], "search": []}
    taken: set[str] = set()
    longest = {"heldout": 0, "search": 0}
    wanted = {"heldout": heldout, "search": search}
    # One for each side first, then in turn: few documents are shared out evenly.
    turns = [side for i in range(max(search, heldout)) for side in ("heldout", "search") if i < wanted[side]]
    for side in turns:
        for document in ordered[side]:
            if document.sha256 in taken or len(document.text.encode("utf-8", "replace")) < length:
                continue
            progress(document.name)
            found, tokens = _windows(tokenizer, document, length, windows_per_document)
            longest[side] = max(longest[side], tokens)
            if found:
                taken.add(document.sha256)
                chosen[side] += found
                break
    for side, windows in chosen.items():
        if not windows and side in required:
            apart = heldout_sources is not None
            argument = "--heldout-text" if side == "heldout" and apart else "--text"
            places = tuple(heldout_sources or ()) if side == "heldout" and apart else sources
            count = 0 if apart else len(taken)
            found_text = f"{count or 'no'} document of {length} tokens"
            most = longest[side] if apart else max(longest.values())
            detail = f"{found_text} (the longest has {most})" if most else found_text
            refuse(argument, f"{detail} in {', '.join(places)}", f"one for the {side} side that the other does not use")
    return Split(tuple(chosen["search"]), tuple(chosen["heldout"]))


def documents(sources: Iterable[str], argument: str = "--text") -> Iterator[Document]:
    """Read documents.

    Args:
        sources: each a text file, a folder of them, a .jsonl file whose objects have a field `text`, `stdlib`, or a
            `datasets` name, `NAME` or `NAME:SPLIT`.
        argument: what an error names.
    """
    for source in sources:
        path = Path(source)
        if source and path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not files:
                refuse(argument, source, f"a folder with files that end in {', '.join(SUFFIXES)}")
            for file in files:
                yield from _file(file, argument)
        elif path.is_file():
            yield from _file(path, argument)
        elif source == "stdlib":
            yield from stdlib((*STDLIB_HELDOUT, *STDLIB_SEARCH))
        else:
            yield from _dataset(source, argument)


def stdlib(names: Iterable[str]) -> Iterator[Document]:
    """Yield those of the named documents that this Python has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in names:
        if name in (TOPICS_FIRST, TOPICS_SECOND):
            yield Document(name, _topics(name == TOPICS_SECOND))
            continue
        path = root / name
        files = sorted(path.glob("*.py")) if name.endswith("/") else [path]
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
        if texts:
            yield Document(f"stdlib {name}", "\n\n".join(texts))


def _topics(second: bool) -> str:
    """Return one half of Python's documentation topics, by name; the second without the paragraphs of the first.

    Topics quote each other: a fifth of the text appears in more than one.
    """
    topics = import_module("pydoc_data.topics").topics
    names = sorted(topics)
    first = "\n\n".join(topics[name] for name in names[: len(names) // 2])
    if not second:
        return first
    seen = {_squeezed(paragraph) for paragraph in first.split("\n\n")}
    rest = "\n\n".join(topics[name] for name in names[len(names) // 2 :]).split("\n\n")
    return "\n\n".join(text for text in rest if len(text) < SHORT_PARAGRAPH or _squeezed(text) not in seen)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _file(path: Path, argument: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(one_line(f"{argument}: got {path} ({error}), expected a readable UTF-8 file")) from None
    if path.suffix != ".jsonl":
        yield Document(str(path), text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            content = next(fields[name] for name in TEXT_FIELDS if isinstance(fields.get(name), str))
        except (ValueError, AttributeError, StopIteration):
            refuse(argument, f"{path} line {number}", f"a JSON object with a string in {', '.join(TEXT_FIELDS)}")
        yield Document(f"{path}:{number}", content)


def _dataset(source: str, argument: str) -> Iterator[Document]:
    expected = "a file, a folder, a .jsonl file, stdlib"
    if not source or source.startswith((".", "/", "~")) or find_spec("datasets") is None:
        refuse(argument, repr(source), f"{expected}, or a dataset's name with the package datasets installed")
    import datasets

    name, _, part = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=part or "train", streaming=True)
        for number, row in enumerate(itertools.islice(rows, DATASET_ROWS)):
            content = next((row[field] for field in TEXT_FIELDS if isinstance(row.get(field), str)), None)
            if content is None:
                refuse(argument, f"{source} with fields {sorted(row)}", f"one of {', '.join(TEXT_FIELDS)}")
            yield Document(f"{source}#{number}", content)
    except UsageError:
        raise
    except Exception as error:  # whatever the hub or a loader raises
        raise UsageError(
            one_line(f"{argument}: got {source!r} ({error}), expected {expected} or a dataset's name")
        ) from error


def _by_content(found: Iterable[Document]) -> list[Document]:
    """Return each text once, in an order that depends on the texts alone."""
    unique = {document.sha256: document for document in found}
    return [unique[key] for key in sorted(unique)]


def _windows(tokenizer: Any, document: Document, length: int, count: int) -> tuple[list[Window], int]:
    """Return up to `count` windows of a document, and how many tokens it has."""
    prefix = tuple(_prefix(tokenizer))
    ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    own = length - len(prefix)
    offsets = range(0, len(ids) - own + 1, own)[:count]
    found = [
        Window(document.name, document.sha256, len(ids), offset, (*prefix, *ids[offset : offset + own]))
        for offset in offsets
    ]
    return found, len(ids) + len(prefix)


def _prefix(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before every text: its beginning-of-sequence token, or nothing."""
    bare, marked = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return list(marked[: marked.index(bare[0])]) if bare and bare[0] in marked else []

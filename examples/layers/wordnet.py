"""WordNet as Debian ships it (`apt-get install wordnet-base`): synsets with their category, words and definition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
CATEGORIES = 45  # of lexicographers: "noun.animal", "verb.motion", ...
_PARTS = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes:
        key: "n00001740". category: number of its lexicographer's file. words: that have the meaning.
        definition: the gloss up to its examples. above: keys of its hypernyms.
    """

    key: str
    category: int
    words: tuple[str, ...]
    definition: str
    above: tuple[str, ...]


def read(folder: Path) -> list[Synset]:
    """All synsets, in the order of the files.

    Raises:
        SystemExit: no WordNet in the folder.
    """
    paths = [folder / f"data.{part}" for part in _PARTS]
    if missing := [path for path in paths if not path.exists()]:
        raise SystemExit(f"{missing[0]} is missing: install the Debian package wordnet-base, or give --data FOLDER")
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [_synset(line) for line in lines if not line.startswith("  ")]  # the licence is indented


def _synset(line: str) -> Synset:
    entry, _, gloss = line.partition(" | ")
    offset, category, kind, count, *rest = entry.split()
    words, rest = rest[: 2 * int(count, 16) : 2], rest[2 * int(count, 16) :]
    pointers = [rest[1 + 4 * i : 5 + 4 * i] for i in range(int(rest[0]))]  # symbol, offset, part of speech, which words
    return Synset(
        key=("a" if kind == "s" else kind) + offset,
        category=int(category),
        words=tuple(word.partition("(")[0].replace("_", " ") for word in words),
        definition=gloss.partition('; "')[0].strip(),
        above=tuple(part + place for symbol, place, part, _ in pointers if symbol in ("@", "@i")),
    )

"""Tokenized evaluation texts back to running text, which models of plain text expect.

WikiText, Penn Treebank and LAMBADA put spaces around punctuation and use special marks (` @-@ `,
"``", `do n't`). Each function here takes the text of a file and restores the running text; letter
case, `<unk>` and Penn Treebank's `N` are lost. Lines stay lines. A detokenizer is a part of
encoding: words, bytes and hashes of documents are those of the file.
"""

# ruff: noqa: RUF001, RUF003  (the texts have dashes, primes and curly quotes)

import re
from collections.abc import Callable

CLITICS = r"(?:s|t|ve|re|m|ll|d)\b"
# After these words in s a single mark opens a quotation (was ' blue '); it is no possessive.
NO_POSSESSIVE = frozenset("as is was has does its his this thus us less plus across versus".split())


def wikitext(text: str) -> str:
    """WikiText-2 and WikiText-103, raw or with `<unk>` (Merity et al., arXiv:1609.07843)."""
    return "\n".join(_wikitext_line(line) for line in text.split("\n"))


def ptb(text: str) -> str:
    """Mikolov's Penn Treebank: lower case, no punctuation, and no apostrophe is a quote."""
    text = _join_contractions(text)
    text = re.sub(r" '(?= |$)", "'", text, flags=re.MULTILINE)
    text = re.sub(r"((?:^|(?<=\s))[a-z]*\$|#) (?=N)", r"\1", text, flags=re.MULTILINE)
    return _strip_lines(text.replace("\\/", "/"))


def lambada(text: str) -> str:
    """The original LAMBADA files (Paperno et al., arXiv:1606.06031), one passage a line.

    OpenAI's file of LAMBADA is running text already and needs no detokenizer.
    """
    text = re.sub(r"(``|`) ?", lambda mark: "\"'"[len(mark[1]) == 1], text)
    text = re.sub(r" ?''", '"', text)
    text = _join_contractions(text)
    text = re.sub(r" '(?= |$)", "'", text, flags=re.MULTILINE)
    text = re.sub(r"\b(gon|wan) na\b", r"\1na", text)
    text = re.sub(r"\b(can) not\b", r"\1not", text)
    return _strip_lines(_join_brackets(_join_punctuation(text)))


# Packed text is cached under these names: raise FORMAT_VERSION when a detokenizer changes.
DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "wikitext": wikitext,
    "ptb": ptb,
    "lambada": lambada,
}


def detokenize(text: bytes, name: str) -> bytes:
    """UTF-8 changed by the detokenizer of that name."""
    return DETOKENIZERS[name](text.decode()).encode()


def _wikitext_line(line: str) -> str:
    line = line.strip(" ")
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r"= (?==)|(?<==) =", "=", line)  # headings: = = History = =
    line = re.sub(rf" (['’]) ?({CLITICS})", r"\1\2", line)
    line = _join_pairs(line, '"')
    line = re.sub(r"(?<= )' (?=\d\ds?\b)", "'", line)  # the ' 70s
    line = _join_pairs(line, "'")
    line = re.sub(r"“ ", "“", re.sub(r" ”", "”", line))
    line = re.sub(r"(?<=\d) : (?=\d)", ":", line)
    line = re.sub(r"(?<=\d) – (?=\d)(?!\d\d? [A-Z][a-z])", "–", line)  # not 1914 – 23 July
    line = re.sub(r" (—|/) ", r"\1", line)
    line = re.sub(r"\b([A-Z]) & ([A-Z])\b", r"\1&\2", line)
    line = re.sub(r"([$£€#]) (?=\d)", r"\1", line)
    line = re.sub(r"(?<=\d) ([°′″])(?: (?=\d|[CFNESW]\b))?", r"\1", line)
    line = re.sub(r"(?<=\d) %", "%", line)
    return _join_brackets(_join_punctuation(line))


def _join_contractions(text: str) -> str:
    """`do n't` and `you 'd` as one word."""
    return re.sub(rf" (n't\b|'{CLITICS})", r"\1", text)


def _join_punctuation(text: str) -> str:
    """No space before a mark that ends a clause; an ellipsis stays a word of its own."""
    return re.sub(r" ([,.;:!?])(?!\.)", r"\1", text)


def _join_brackets(text: str) -> str:
    return re.sub(r" ([)\]}])", r"\1", re.sub(r"([(\[{]) ", r"\1", text))


def _join_pairs(line: str, mark: str) -> str:
    """Join free-standing quotation marks to what they quote: they open and close in turn. A single
    mark after a word in s, outside a quotation, is a possessive (the brothers ' house)."""
    spaces, is_open = [-1], False  # places of the spaces that go
    for match in re.finditer(f"(?<![^ ]){mark}(?![^ ])", line):
        place = match.start()
        before = line[line.rfind(" ", 0, max(0, place - 1)) + 1 : max(0, place - 1)]
        is_possessive = (
            mark == "'" and not is_open
            and before.endswith("s") and before.lower() not in NO_POSSESSIVE
        )  # fmt: skip
        opens = not is_open and not is_possessive
        space = place + 1 if opens else place - 1
        if space > spaces[-1]:
            spaces.append(space)
        is_open ^= not is_possessive
    ends = [*spaces[1:], len(line)]
    return "".join(line[space + 1 : end] for space, end in zip(spaces, ends, strict=True))


def _strip_lines(text: str) -> str:
    return "\n".join(line.strip(" ") for line in text.split("\n"))

"""Tokenize captions as the Penn Treebank does, in lower case and without punctuation.

The scores of the COCO evaluation are defined on the words of Stanford's PTBTokenizer (Java, in `java.py`). `plain`
returns nearly the same words without Java. Its rules were derived from the output of PTBTokenizer 3.4.1 for captions.
"""

import re

# Tokens that coco-caption removes (Chen et al. 2015, section 3). Its tokens for brackets are in capitals, but the texts are in
# lower case. So it does not remove brackets: published scores count them as the words -lrb- and -rrb-.
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())

SPELLED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
SPELLED |= {"€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "&amp;": "&"}
SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "gimme": "gim me", "lemme": "lem me", "wanna": "wan na"}
SPLIT |= {"'tis": "'t is", "'twas": "'t was"}
QUOTES = str.maketrans({"’": "'", "‘": "'", "‹": "'", "›": "'", "“": '"', "”": '"', "«": '"', "»": '"'})
DOTTED = (  # words that keep their full stop, even at the end of a caption
    "mr mrs ms dr st jr sr vs etc inc ltd co corp ave blvd mt ft prof gen sgt capt lt col rev hon gov sen rep tel est dept "
    "assn bros jan feb mar apr aug sept oct nov dec bldg rd conn ala va univ al ph alex treas messrs sq"
)

WORD = re.compile(
    rf"""
      https?://\S+ | www\.\S+ | [\w.+-]+@[\w-]+(?:\.\w+)+     # addresses
    | </?[a-z][^<>]*> | &amp; | (?<!\w)[@\#][a-z_]\w*         # tags, handles
    | [:;]-?[()]                                              # smileys
    | (?:ph\.d|(?<![\w.])[^\W\d_](?:\.[^\W\d_])*)\.(?!\w)     # u.s.  p.m.  a.
    | \b(?:{DOTTED.replace(" ", "|")})\.(?!\w)
    | \bno\.(?=\ ?\d)                                         # no. 5
    | (?<!\w)'(?:n'|n\b|em\b|til\b|cause\b|tis\b|twas\b|\d\ds?\b)
    | (?<=\w)'n'(?=\w)                                        # rock 'n' roll
    | (?<=\w)'(?:s|m|d|re|ve|ll|n)(?!\w)                      # it 's
    | (?<=\w)n't(?!\w)                                        # do n't
    | \w+(?=n't(?!\w))
    | \b(?:[cdlnos]'(?!s\b)\w{{2,}}|ma'am|ol')                # o'clock
    | \by'(?=\w)                                              # y' all
    | (?<!\w)[-+]?\.?\d+(?:[.,:/-]?\w+)*                      # -0.5  1,000  1/2  20-year-old
    | [^\W\d]\w*(?:[-/]\w+|(?<=[^\W\d])\.(?=[^\W\d])\w+)*(?:\+\+|\#(?!\w))?
    | \.{{3,}} | \.(?:\ \.){{2,}} | … | --+ | [?!]{{2,}} | \*+ | ''+ | ``+
    | [^\s\U00010000-\U0010ffff]                              # any other mark, alone; emoji are dropped
    """,
    re.VERBOSE | re.IGNORECASE,
)


def without_punctuation(words: list[str]) -> str:
    """Return the words that are not punctuation, joined by spaces."""
    return " ".join(word for word in words if word not in PUNCTUATION)


def plain(caption: str) -> str:
    """Return nearly the same words as PTBTokenizer, without coco-caption's punctuation, joined by spaces.

    "It's a man's (red) T-shirt." → "it 's a man 's -lrb- red -rrb- t-shirt". The words equal PTBTokenizer's in
    97 % of 1,900 sentences of technical prose. Exceptions: code, mark-up, abbreviations that are not in DOTTED, smileys, and
    rare forms such as AT&T, US$5, 1½ or 6'10.
    """
    words: list[str] = []
    for word in WORD.findall(" ".join(caption.lower().translate(QUOTES).split())):
        if not word.strip("\"'`.-–—…"):
            continue  # quotes, dashes and full stops of any length
        word = SPLIT.get(word, SPELLED.get(word, word))
        words += [re.sub(r"[()]", lambda mark: SPELLED[mark[0]], word)] if word[0] in ":;" else word.split()
    return without_punctuation(words)

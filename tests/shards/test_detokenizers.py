# ruff: noqa: RUF001  (the texts have dashes and primes)

import pytest

from algpt2.shards.detokenizers import DETOKENIZERS, lambada, ptb, wikitext

WIKITEXT = {
    ' \n = = Track listing = = \n " Go " , the @-@ one : a 1 @,@ 000 @.@ 5 % ( x ) [ ... ] \n':
    '\n== Track listing ==\n"Go", the-one: a 1,000.5% (x) [...]\n',
    " = Homarus gammarus = ": "= Homarus gammarus =",
    "I don 't know ; it 's Linnaeus ' idea": "I don't know; it's Linnaeus' idea",
    "the ' anti lodgment ' board was ' blue ' ?": "the 'anti lodgment' board was 'blue'?",
    "the Rhymers ' Club , then the ' blue ' one": "the Rhymers' Club, then the 'blue' one",
    'he said " yes " , then " no " .': 'he said "yes", then "no".',
    "in 2011 – 12 , at 3 : 05 , 90 km / h and $ 2 million": "in 2011–12, at 3:05, 90 km/h and $2 million",  # noqa: E501
    "( 15 July 1914 – 23 December 1998 )": "(15 July 1914 – 23 December 1998)",
    "35 ° F ( 2 ° C ) , 57 ° 53 ′ N": "35°F (2°C), 57°53′N",
    "R & B — and Arm & Hammer": "R&B—and Arm & Hammer",
    "the ' 70s": "the '70s",
    "<unk> of the <unk> , then": "<unk> of the <unk>, then",
}  # fmt: skip


@pytest.mark.parametrize("tokenized", WIKITEXT)
def test_wikitext_becomes_running_text(tokenized):
    assert wikitext(tokenized) == WIKITEXT[tokenized]


def test_penn_treebank_becomes_running_text():
    text = (
        " no it was n't the analysts ' and poor 's view \n about $ N or c$ N or # N 1\\/2 <unk> \n"
    )
    assert (
        ptb(text) == "no it wasn't the analysts' and poor's view\nabout $N or c$N or #N 1/2 <unk>\n"
    )


def test_lambada_becomes_running_text():
    text = "`` why ? '' `` you 'd say ` ai n't ' ( dry ) , i can not , '' she said .\nhe 's gon na"
    assert lambada(text) == "\"why?\" \"you'd say 'ain't' (dry), i cannot,\" she said.\nhe's gonna"


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_running_text_and_lines_stay(name):
    text = 'Plain text: "quoted", isn\'t it?\n\nIt cost $5 (a lot).\n'
    assert DETOKENIZERS[name](text) == text
    assert DETOKENIZERS[name]("") == ""

"""Planted sentences, properties of any text, and the organism's chains, whose sentences are known from the grammar."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensteer.annotation.splitting import split_sentences
from lensteer.organism.grammar import FAMILIES, THINK, Latent, make_world, render, write_chain


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


#: `‖` marks where a sentence should end; it is taken out first.
EXAMPLES = {
    "plain": "First I add. ‖Then I stop. ‖Done",
    "decimals": "Pi is 3.14 or so. ‖Version 2.0.1 has .5 of it. ‖Next.",
    "abbreviations": "See Dr. Smith, e.g. on dogs vs. Cats, i.e. Fig. 2 of it. ‖It says approx. 5.",
    "initials": "J. K. Rowling wrote it. ‖So did J. R. R. Tolkien. ‖And C. S. Lewis.",
    "one capital is a name for a thing": "The answer is B. ‖Then we go from B to C. ‖Wait, C fails.",
    "etc. before a capital": "Apples, pears, etc. ‖The rest is left.",
    "etc. before a small letter": "Apples, pears, etc. and the rest at 5 p.m. sharp. ‖At 6 p.m. ‖We eat.",
    "acronyms": "The U.S. Army has it. ‖Bob has a Ph.D. in it.",
    "ellipsis": "Hmm... let me see. ‖So 1, 2, ..., 9 and 1 + 2 + ... + 9. ‖Well... ‖Wait… ‖No.",
    "runs": "What?! ‖Really!! ‖Yes.",
    "numbers that end": "It is 5. ‖Then x = 12. ‖That makes 17.",
    "lists": "Steps:\n‖1. First this. ‖2. Then that.\n‖3. Last\n‖4) And this one\n‖- A bullet\n‖* Another\n‖Then on",
    "a list behind a colon": "So we have:\n‖x = 5\nand more",
    "headings and tables": "# Title here\n‖Text goes\non and on\n‖| a | b |\n‖| c | d |",
    "blank lines": "No stop here\n\n‖none here either\n \t\n‖end",
    "a line that ends a sentence": "This ends.\n‖This does not\nend here, though. ‖End",
    "quotes": 'He said "Stop." ‖Then "why?" was asked. ‖“Now.” ‖‘So.’ ‖It is.',
    "brackets": "(So it is.) ‖[Or not.] ‖Maybe (see above.) we go on.",
    "emphasis": "**Bold.** ‖*Slanted.* ‖`Code.` ‖**Step one:** go. ‖_Yes!_ ‖End",
    "factorials": "So 5! = 120 and n! / (k! (n - k)! ), then 4! ways and x! is it. ‖But (3!)! ‖So there!",
    "dollars": r"So $x = 1. y$ holds and $$a. B$$ too. ‖Also $5! \times 3. 2$ it is $x.$ ‖Then",
    "prices": "It costs $5. ‖She pays $10. ‖So $15 in all.",
    "brackets of LaTeX": "We have \\( a. B \\) and \\[ x = 5. \n So y \\] as shown. ‖Then \\(z\\). ‖End.",
    "no blank, no end": "See foo.bar and so.Then it goes.",
    "other scripts": "我们看看。‖是吗？‖是的！‖Then on.",
    "other scripts' quotes": "「走吧。」‖『好！』‖他说（是的。）‖好",
    "runs in other scripts": "是吗？！‖好。。。‖是！!‖完",
    "Hindi and Arabic": "यह है।‖क्या? ‖हाँ॥ ‖هل هو؟‖نعم۔ ‖तम",
    "between digits": "３．１４と३।१४と॥१॥‖次．‖それ",
    "nothing": " \n\t ",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_planted_sentences(name):
    parts = [part.strip() for part in EXAMPLES[name].split("‖")]
    assert sentences(EXAMPLES[name].replace("‖", "")) == [part for part in parts if part]


def test_a_blank_line_ends_even_a_formula():
    assert sentences("We take \\[ x \n\n y \\] here. Then") == ["We take \\[ x", "y \\] here.", "Then"]


def test_what_opens_a_formula_and_never_closes_hides_nothing():
    assert sentences("We take \\( x. Then \\[ y. So $z. End") == ["We take \\( x.", "Then \\[ y.", "So $z.", "End"]


pieces = st.sampled_from(
    [
        *"aB1 .!?…:;,()[]\"'*_`$\\#-|=+\n。！“”>",
        *("\\(", "\\)", "\\[", "\\]", "$$", "\n\n", "\n- ", "1. ", " J. K.", "etc.", "e.g.", "p.m."),
        *("。", "？」", "।", "．5", " n!", "So ", "...", ". ", "? ", "A. ", "\r\n", "\x85", "\xa0"),
    ]
)


@pytest.mark.medium
@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(pieces, max_size=30).map("".join), st.text(max_size=60)))
def test_any_text_is_covered_in_order_and_a_sentence_is_one(text):
    behind = 0
    for start, end in split_sentences(text):
        assert behind <= start < end
        assert not text[behind:start].strip()
        assert text[start:end] == text[start:end].strip()
        assert split_sentences(text[start:end]) == [(0, end - start)]
        behind = end
    assert not text[behind:].strip()


def seconds(text: str) -> float:
    before = time.process_time()
    split_sentences(text)
    return time.process_time() - before


@pytest.mark.parametrize(
    "piece",
    [".", "a! ", "$x ", "\\( ", "... ", 'a. "', "\n", "a\n ", ":", "\n*", "(", ". $", "From B to C, as 3.5 is more. "],
)
def test_no_text_takes_long(piece):
    assert seconds((piece * 30000)[:30000]) < 10  # a step for every pair of characters would take minutes


def test_the_grammars_sentences_are_found():
    rng = random.Random(0)
    for i in range(200):
        world = make_world(rng, FAMILIES[i % 2], 1 + i // 2 % 3)
        written = write_chain(rng, world, Latent.draw(rng))
        thinking = render(written, world.answer).removeprefix(THINK).partition("</think>")[0]
        assert sentences(thinking) == [sentence.text for sentence in written]

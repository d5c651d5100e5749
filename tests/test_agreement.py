"""Agreement against scikit-learn and planted confusions; masking cues, for annotators with and without cue words."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics

from lensteer.annotation import (
    MARKERS,
    agreement,
    agreement_of,
    annotate,
    grammar,
    left_out_source,
    macro_f1,
    marker_dependence,
    mask_markers,
    masked,
    masking,
)
from lensteer.annotation.splitting import split_sentences
from lensteer.behaviors import BEHAVIORS, UNPARSED, Sentence
from lensteer.errors import LensteerError
from lensteer.organism.grammar import FAMILIES, Latent, make_world, render, write_chain
from test_published import trace

INITIALIZING, DEDUCTION, KNOWLEDGE, EXAMPLE, UNCERTAINTY, BACKTRACKING = BEHAVIORS


def random_pairs(n_chains=40, length=30, noise=0.3, seed=0):
    """Chains of labels, and the labels of an annotator that guesses a share of `noise` of them."""
    rng = random.Random(seed)
    options = [*BEHAVIORS, None]
    chains = []
    for _ in range(n_chains):
        truth = [rng.choice(options[: rng.randint(2, 7)]) for _ in range(length)]
        chains.append([(label, rng.choice(options) if rng.random() < noise else label) for label in truth])
    return chains


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_scikit_learns(seed):
    chains = random_pairs(noise=0.2 * seed, seed=seed)
    found = agreement_of(chains, n_boot=20)
    first, second = ([str(pair[side]) for chain in chains for pair in chain] for side in (0, 1))
    names = [*BEHAVIORS, "None"]
    assert found.labels == (*BEHAVIORS, "none")
    assert found.confusion.tolist() == metrics.confusion_matrix(first, second, labels=names).tolist()
    assert found.kappa.value == pytest.approx(metrics.cohen_kappa_score(first, second))
    assert found.accuracy.value == pytest.approx(metrics.accuracy_score(first, second))
    rows = metrics.precision_recall_fscore_support(first, second, labels=list(BEHAVIORS))
    for own, *row in zip(found.per_label, *rows, strict=True):
        assert (own.precision.value, own.recall.value, own.f1.value, own.n_first) == pytest.approx(tuple(row))
    assert found.macro_f1.value == pytest.approx(
        metrics.f1_score(first, second, labels=list(BEHAVIORS), average="macro")
    )
    assert (found.n_chains, found.n_sentences) == (40, 1200)


def test_macro_f1_is_over_the_labels_that_the_truth_has():
    truth = [DEDUCTION, DEDUCTION, BACKTRACKING, BACKTRACKING]
    guess = [DEDUCTION, DEDUCTION, BACKTRACKING, KNOWLEDGE]
    assert macro_f1(truth, guess) == pytest.approx((1 + 2 / 3) / 2)
    assert macro_f1(truth, [None] * 4) == 0
    assert math.isnan(macro_f1([None], [DEDUCTION]))
    assert macro_f1(["a"], ["a"], labels=["a", "b"]) == 1
    with pytest.raises(LensteerError, match="2 true labels and 1 guesses"):
        macro_f1([DEDUCTION] * 2, [DEDUCTION])


def test_intervals_hold_the_truth_as_often_as_they_say():
    """The second annotator is right with p = 0.8, and by chain: with 0.6 or 1. Accuracy is 0.8."""
    hits, widths = 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        chains = []
        for _ in range(50):
            right = rng.random(20) < rng.choice([0.6, 1.0])
            truth = rng.choice(BEHAVIORS[:3], 20).tolist()
            chains.append([(t, t if r else BACKTRACKING) for t, r in zip(truth, right, strict=True)])
        found = agreement_of(chains, n_boot=300, seed=seed).accuracy
        assert found.low < found.value < found.high
        hits += found.low <= 0.8 <= found.high
        widths.append(found.high - found.low)
    # 95 of 100, ± 2.2; percentile intervals of 50 units hold a little less.
    assert 85 <= hits <= 100
    # As wide as chains differ (0.22 / √50 · 3.9), not as independent sentences would be (0.05).
    assert 0.10 < np.mean(widths) < 0.14


def test_the_same_seed_gives_the_same_intervals():
    chains = random_pairs()
    assert agreement_of(chains, n_boot=50).kappa == agreement_of(chains, n_boot=50).kappa
    assert agreement_of(chains, n_boot=50).kappa != agreement_of(chains, n_boot=50, seed=1).kappa


def test_undefined_figures_are_nan():
    found = agreement_of([[(DEDUCTION, DEDUCTION)] * 3, [(DEDUCTION, DEDUCTION)]], n_boot=20)
    assert (found.accuracy.value, found.macro_f1.value) == (1, 1)
    assert math.isnan(found.kappa.value)  # both say one thing only: chance agrees as well
    assert math.isnan(found.kappa.low)
    assert all(math.isnan(own.precision.value) for own in found.per_label if own.label != DEDUCTION)
    assert math.isnan(agreement_of(random_pairs(1)).kappa.low)  # one chain cannot be resampled


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(LensteerError, match="unknown label 'summarizing'"):
        agreement_of([[(DEDUCTION, "summarizing")]], labels=BEHAVIORS)
    with pytest.raises(LensteerError, match="no sentence in 2 chain"):
        agreement_of([[], []])
    with pytest.raises(LensteerError, match="n_boot=-1"):
        agreement_of([[(DEDUCTION, DEDUCTION)]], n_boot=-1)


# --- traces ---------------------------------------------------------------------------------------

SENTENCES = ["First, I look.", "So x is 2.", "Wait, no.", "Maybe 3."]


def chains(*labels: str | None, n=4):
    """`n` chains of four sentences with these labels."""
    found = []
    for i in range(n):
        spans = [(label, text) for label, text in zip(labels, SENTENCES, strict=True) if label]
        one = trace(f"<think>{' '.join(SENTENCES)}</think>It is {i}.", *spans)
        found.append(replace(one, task=replace(one.task, id=f"t{i}")))
    return found


def test_a_planted_confusion_is_recovered():
    first = chains(INITIALIZING, DEDUCTION, BACKTRACKING, UNCERTAINTY)
    second = chains(DEDUCTION, DEDUCTION, UNCERTAINTY, None)[::-1]
    found = agreement(first, second, n_boot=50)
    expected = np.zeros((7, 7), int)
    for pair in [(0, 1), (1, 1), (5, 4), (4, 6)]:
        expected[pair] = 4
    assert found.confusion.tolist() == expected.tolist()
    assert (found.n_chains, found.n_sentences, found.accuracy.value) == (4, 16, 0.25)
    frame = found.to_dataframe().set_index(["figure", "label"])
    assert frame.loc[("recall", DEDUCTION), "value"] == 1
    assert frame.loc[("precision", DEDUCTION), "value"] == 0.5
    assert frame.loc[("f1", BACKTRACKING), "n"] == 4
    assert list(frame.loc[("accuracy", "")]) == [0.25, 0.25, 0.25, 16]
    flat = found.figures()
    assert (flat["n_chains"], flat["accuracy_low"], flat[f"recall.{DEDUCTION}_high"]) == (4, 0.25, 1)
    assert f"recall.{KNOWLEDGE}" not in flat


def test_a_sentence_that_one_annotator_splits_counts_for_its_larger_part():
    text = "Wait, so x is 2."
    whole = trace(f"<think>{text}", (DEDUCTION, text))
    parts = trace(f"<think>{text}", (BACKTRACKING, "Wait,"), (DEDUCTION, "so x is 2."))
    assert agreement([whole], [parts]).accuracy.value == 1


def test_other_chains_are_refused():
    first = chains(*[DEDUCTION] * 4)
    with pytest.raises(LensteerError, match=r"1 chain\(s\) on one side only, such as 't3/0'"):
        agreement(first, first[:3])
    with pytest.raises(LensteerError, match="first has 5 traces but 4 ids"):
        agreement([*first, first[0]], first)
    other = [replace(one, response=one.response.replace("2", "3")) for one in first]
    with pytest.raises(LensteerError, match="'t0/0' have different responses"):
        agreement(first, other)


# --- cues -----------------------------------------------------------------------------------------


def test_cues_are_masked_whole_and_with_their_capital():
    assert mask_markers("Wait, maybe it awaits. HMM, for  example 3.") == "Xxx, xxx it awaits. Xxx, xxx 3."
    assert mask_markers("Let's say it is e.g. 5. I don’t know.") == "Xxx it is xxx 5. I don’t know."
    assert mask_markers("It is 4.") == "It is 4."
    for cue in MARKERS:
        assert mask_markers(f"B {cue} C") == "B xxx C"
        assert mask_markers(mask_markers(cue)) == mask_markers(cue)


def test_masked_chains_have_the_same_sentences():
    (one,) = chains(*[DEDUCTION] * 4, n=1)
    (blind,) = masked([one])
    assert blind.response == "<think>Xxx, I look. Xxx x is 2. Xxx, no. Xxx 3.</think>It is 0."
    assert (blind.spans, len(blind.offsets), set(blind.response_ids)) == ((), len(blind.response), {0})
    (control,) = masked([one], control=True, seed=3)
    assert control.response.count("xx") == 4
    assert mask_markers(control.response).count("xx") == 8  # none of them was a cue
    for other in (blind, control):
        n = [len(split_sentences(t.response[slice(*t.thinking)])) for t in (one, other)]
        assert n == [4, 4]


def by_cue(traces):
    """Labels by one cue word."""
    return [labeled(t, lambda text, i: BACKTRACKING if "Wait" in text else DEDUCTION) for t in traces]


def by_place(traces):
    """Labels by position in the chain."""
    return [labeled(t, lambda text, i: BEHAVIORS[i % 6]) for t in traces]


def labeled(one, rule):
    start, end = one.thinking
    text = one.response[start:end]
    return [Sentence(rule(text[a:b], i), text[a:b]) for i, (a, b) in enumerate(split_sentences(text))]


def test_masking_tells_who_goes_by_cues():
    plain = chains(*[None] * 4, n=8)
    assert marker_dependence(plain, by_place, n_boot=20).accuracy.value == 1
    found = marker_dependence(plain, by_cue, n_boot=20)
    assert found.confusion[5, 1] == 8  # backtracking became deduction
    assert found.accuracy.value == 0.75
    assert marker_dependence(plain, by_cue, control=True, n_boot=20).accuracy.value == 1


def test_the_control_tells_cues_from_words():
    """The grammar needs every word of a form: with cues masked few sentences parse, but no fewer than with others."""
    rng = random.Random(0)
    traces = []
    for i in range(20):
        world = make_world(rng, FAMILIES[i % 2], 2)
        one = trace(render(write_chain(rng, world, Latent.draw(rng)), world.answer))
        traces.append(replace(one, task=replace(one.task, id=f"t{i}")))
    blind = marker_dependence(traces, grammar, n_boot=200)
    control = marker_dependence(traces, grammar, control=True, n_boot=200)
    assert blind.n_sentences == control.n_sentences
    assert blind.accuracy.high < 0.8
    assert control.accuracy.high < 0.8
    assert blind.accuracy.high > control.accuracy.low
    for found in (blind, control):  # what it reads, it reads right
        assert np.count_nonzero(found.confusion[:, :-1]) == np.count_nonzero(np.diagonal(found.confusion)[:-1])


# --- annotators that see masked text, and label what stands there -----------------------------------


def counted(traces, annotator):
    """Labels of all chains, with the sentences that no label was given."""
    found = annotate(traces, annotator)
    return Counter(s.label for t in found for s in t.spans) + Counter({None: sum(t.n_unparsed for t in found)})


def test_a_masked_annotator_that_goes_by_cues_finds_nothing_of_them():
    plain = chains(*[None] * 4, n=8)
    assert counted(plain, by_cue) == {BACKTRACKING: 8, DEDUCTION: 24}
    assert counted(plain, masking(by_cue)) == {DEDUCTION: 32}
    # As many other words hide nothing from one that goes by cues, nor anything from one that goes by the place.
    assert counted(plain, masking(by_cue, control=True)) == {BACKTRACKING: 8, DEDUCTION: 24}
    for control in (False, True):
        assert counted(plain, masking(by_place, control=control)) == counted(plain, by_place)


def test_a_masked_annotator_labels_the_text_as_it_is():
    """Labels of the masked sentences are assigned to the original ones, in order."""
    plain = chains(*[None] * 4, n=4)
    for control in (False, True):
        seen = annotate(plain, masking(by_place, control=control, seed=2))
        assert [t.spans for t in seen] == [t.spans for t in annotate(plain, by_place)]
        for one in seen:
            assert one.response == plain[0].response.replace("It is 0.", one.response[-8:])
            assert [one.response[s.char_start : s.char_end] for s in one.spans] == SENTENCES


def test_the_control_masks_as_many_other_words():
    plain, shown = chains(*[None] * 4, n=6), []

    def spy(traces):
        shown.extend(t.response for t in traces)
        return by_place(traces)

    masking(spy)(plain)
    masking(spy, control=True)(plain)
    masking(spy, control=True)(plain)
    masking(spy, control=True, seed=1)(plain)
    cues, control, again, other = (shown[6 * i : 6 * i + 6] for i in range(4))
    assert {text.lower().count("xxx") for text in cues + control} == {4}
    assert all("First" not in text and "Wait" not in text for text in cues)
    assert all(word in text for text in control for word in ("First", "So", "Wait", "Maybe"))  # the cues stand
    assert control == again != other


def test_sentences_that_cannot_be_read_are_counted_though_masked():
    """They stay in every denominator, so that a masked share is of the same sentences."""

    def unsure(traces):
        return [labeled(t, lambda text, i: UNPARSED if "no" in text else DEDUCTION) for t in traces]

    def blinded(traces):
        return [labeled(t, lambda text, i: DEDUCTION if "Wait" in text else UNPARSED) for t in traces]

    plain = chains(*[None] * 4, n=3)
    assert counted(plain, masking(unsure)) == counted(plain, unsure) == {DEDUCTION: 9, None: 3}
    assert counted(plain, blinded) == {DEDUCTION: 3, None: 9}
    assert counted(plain, masking(blinded)) == {None: 12}


# --- a classifier without the source that it is judged on -------------------------------------------

WORDS = {
    INITIALIZING: "Okay, I am asked about",
    DEDUCTION: "So it follows that we have",
    KNOWLEDGE: "Recall that there is",
    EXAMPLE: "For example, try",
    UNCERTAINTY: "Hmm, maybe it is",
    BACKTRACKING: "Wait, let me go back to",
}


def sourced(words, source, n=12, seed=0):
    """Annotated chains on the same questions, as one model writes them."""
    rng, found = random.Random(f"{seed}{source}"), []
    for i in range(n):
        told = [(b, f"{words[b]} {rng.randint(2, 99)} doors.") for b in rng.choices(BEHAVIORS, k=12)]
        one = trace(f"<think>{' '.join(text for _, text in told)}</think>Done.", *told)
        found.append(replace(one, task=replace(one.task, id=f"q{i}"), sample=source))
    return found


def test_planted_labels_are_recovered_without_the_source():
    traces = [*sourced(WORDS, 0), *sourced(WORDS, 1)]
    found = left_out_source(traces, ["a"] * 12 + ["b"] * 12, n_boot=50)
    assert found.macro_f1.value > 0.95
    assert (found.n_chains, found.n_sentences) == (24, 24 * 12)  # each chain once
    assert left_out_source(traces, ["a"] * 12 + ["b"] * 12, n_boot=50).macro_f1 == found.macro_f1


def test_what_only_the_source_itself_would_tell_is_not_learned():
    """In the second source the same words mean other labels: a classifier fitted on the first mislabels it."""
    turned = dict(zip(BEHAVIORS, [WORDS[b] for b in (*BEHAVIORS[1:], BEHAVIORS[0])], strict=True))
    traces = [*sourced(WORDS, 0), *sourced(turned, 1)]
    assert left_out_source(traces, [0] * 12 + [1] * 12, n_boot=0).macro_f1.value < 0.2
    # The same chains with the sources mixed up: each side has seen both.
    assert left_out_source(traces, [i % 2 for i in range(24)], n_boot=0).macro_f1.value > 0.2


def test_one_source_cannot_be_left_out():
    traces = sourced(WORDS, 0, n=4)
    with pytest.raises(LensteerError, match=r"4 sources \(1 different\) for 4 traces"):
        left_out_source(traces, ["a"] * 4)
    with pytest.raises(LensteerError, match=r"3 sources \(3 different\) for 4 traces"):
        left_out_source(traces, ["a", "b", "c"])

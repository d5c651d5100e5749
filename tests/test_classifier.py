"""The sentence classifier on chains whose labels follow from planted cues, on the organism's, and on published ones."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lensteer as ls
from lensteer.annotation import annotate, annotate_report, labeled_sentences, read_published, write_published
from lensteer.annotation.agreement import agreement
from lensteer.annotation.classifier import SentenceClassifier, fit_classifier
from lensteer.annotation.classifier_model import ClassifierConfig, fit_scaling, gather, span_lengths
from lensteer.annotation.classifier_report import cross_validate
from lensteer.annotation.features import Chain, FeatureWeights, features, learn_vocabulary, tokens
from lensteer.behaviors import BEHAVIORS, UNPARSED, Span
from lensteer.errors import LensteerError
from lensteer.files import read_tensors, write_tensors
from lensteer.tasks import Task
from lensteer.traces import Trace

CUES = {
    "initializing": ("Okay, the task asks about", "I am asked about"),
    "deduction": ("So it follows that we have", "Therefore we get"),
    "adding-knowledge": ("Recall the law of", "By definition we know"),
    "example-testing": ("For example, try", "Suppose we take"),
    "uncertainty-estimation": ("I am not sure about", "Hmm, maybe it is"),
    "backtracking": ("Wait, go back from", "No, another way without"),
}
NOUNS = "apple river stone cloud engine violin harbor mirror candle forest ladder pocket sugar window".split()


def chain_of(sentences, name="t", blank=0.0, rng=None):
    """A trace whose spans are (label, text) one by one; one token per character."""
    response, spans = "", []
    for label, text in sentences:
        spans.append(Span(label, 1 + len(response), 1 + len(response) + len(text), len(response), len(response + text)))
        response += text + ("\n\n" if rng and rng.random() < blank else " ")
    ids = tuple(range(len(response)))
    return Trace(Task(name, "planted", "train", ""), "<think>", response, (0,), ids, ids, True, spans=tuple(spans))


def planted(n=40, length=12, seed=0, labels=BEHAVIORS, noise=0.0):
    """Chains of sentences with one of two cues for each label; `noise` is the share of random labels."""
    rng = random.Random(seed)
    chains = []
    for i in range(n):
        said = []
        for _ in range(length):
            label = rng.choice(labels)
            text = f"{rng.choice(CUES[label])} the {rng.choice(NOUNS)} and {rng.choice(NOUNS)}."
            said.append((rng.choice(labels) if rng.random() < noise else label, text))
        chains.append(chain_of(said, f"t{i}", 0.3, rng))
    return chains


@pytest.fixture(scope="module")
def classifier():
    return fit_classifier(planted())


def test_planted_cues_are_found_on_new_chains(classifier):
    new = planted(10, seed=1)
    found, reports = annotate_report(new, classifier)
    assert all(report.placed == 1 for report in reports)
    assert agreement(new, found).macro_f1.value > 0.97
    assert [s.text for s in classifier(new)[0]] == [s.text for s in labeled_sentences(new[0])]
    assert classifier.provenance["cross_validated"]["spans"]["macro_f1"][0] > 0.97
    assert classifier.provenance["n_chains"] == 40


def test_shuffled_labels_give_chance():
    rng = random.Random(3)
    chains = []
    for chain in planted(40):
        labels = [span.label for span in chain.spans]
        rng.shuffle(labels)
        spans = tuple(replace(s, label=label) for s, label in zip(chain.spans, labels, strict=True))
        chains.append(replace(chain, spans=spans))
    report = cross_validate(chains, n_boot=200)
    assert abs(report.agreement.kappa.value) < 0.1
    assert report.agreement.macro_f1.value < 0.27


@pytest.mark.medium
def test_probabilities_are_the_share_of_labels_that_are_right():
    """With a third of the labels random, a cue is right with 2/3 + 1/3 · 1/6 = .72."""
    config = ClassifierConfig(FeatureWeights(place=0.0, neighbors=0.0), strength=0.1)
    report = cross_validate(planted(80, noise=1 / 3), units="spans", n_boot=200, config=config)
    assert report.agreement.accuracy.value == pytest.approx(0.72, abs=0.06)
    assert report.calibration_error < 0.1
    assert sum(bin_.n for bin_ in report.reliability) == 80 * 12
    assert np.mean([bin_.confidence for bin_ in report.reliability]) == pytest.approx(0.72, abs=0.06)


@pytest.mark.medium
def test_sentences_that_say_nothing_are_told_from_those_that_do_by_abstaining():
    rng = random.Random(5)
    chains = []
    for i in range(60):
        said = []
        for _ in range(12):
            label = rng.choice(BEHAVIORS)
            cue = rng.choice(CUES[label]) if rng.random() < 0.5 else "It is"
            said.append((label, f"{cue} the {rng.choice(NOUNS)} and {rng.choice(NOUNS)}."))
        chains.append(chain_of(said, f"t{i}"))
    report = cross_validate(chains, units="spans", n_boot=200)
    accuracy = {at.abstain: at.accuracy.value for at in report.coverage}
    coverage = [at.coverage for at in report.coverage]
    assert coverage == sorted(coverage, reverse=True)
    assert report.agreement.accuracy.value == pytest.approx(0.5 + 0.5 / 6, abs=0.07)
    assert accuracy[0.6] > 0.9
    assert coverage[list(accuracy).index(0.6)] == pytest.approx(0.5, abs=0.07)
    table = report.to_dataframe()
    assert {"macro_f1", "kappa", "f1", "calibration_error", "coverage"} <= set(table["figure"])
    assert set(table["label"]) == {"", *BEHAVIORS}
    assert table.query("figure == 'coverage'")["value"].tolist() == coverage


def test_what_is_too_improbable_is_unparsed(classifier):
    odd = chain_of([("deduction", "Bananas rot."), ("deduction", "Therefore we get the apple and stone.")])
    never = replace(classifier, abstain=1.0)
    assert {s.label for s in never([odd])[0]} == {UNPARSED}
    (p,) = classifier.probabilities([odd])
    assert p.sum(1) == pytest.approx(1)
    between = replace(classifier, abstain=float(np.sort(p.max(1)).mean()))
    assert [s.label for s in between([odd])[0]] == [UNPARSED, "deduction"]
    annotated = annotate([odd], between)[0]
    assert (len(annotated.spans), annotated.n_unparsed) == (1, 1)


def test_labels_without_a_cue_of_their_own_are_told_by_place_and_neighbors():
    """The same words throughout: the first sentence initializes, and what follows a "Stop." backtracks."""
    rng = random.Random(0)
    chains = []
    for i in range(40):
        said = [("initializing", f"The {rng.choice(NOUNS)} is here.")]
        for _ in range(6):
            if stop := rng.random() < 0.4:
                said.append(("uncertainty-estimation", "Stop."))
            said.append(("backtracking" if stop else "deduction", f"The {rng.choice(NOUNS)} is here."))
        chains.append(chain_of(said, f"t{i}"))
    seen = cross_validate(chains, n_boot=0, config=ClassifierConfig(FeatureWeights(neighbors=1.0)))
    blind = cross_validate(chains, n_boot=0, config=ClassifierConfig(FeatureWeights(neighbors=0.0, place=0.0)))
    assert seen.agreement.macro_f1.value > 0.97
    assert blind.agreement.macro_f1.value < 0.75


@pytest.mark.medium
def test_sentences_of_one_thought_get_its_label_though_only_one_of_them_has_the_cue():
    rng = random.Random(0)
    chains = []
    for i in range(40):
        said = []
        for _ in range(8):
            label = rng.choice(BEHAVIORS)
            said.append((label, f"{rng.choice(CUES[label])} the {rng.choice(NOUNS)}. It is the {rng.choice(NOUNS)}."))
        chains.append(chain_of(said, f"t{i}", 1.0, rng))
    material = gather(chains, None, None, 5, 0)
    lengths = span_lengths(material.spans.chains, material.sentences.chains, 3)
    assert lengths.tolist() == [0, 1, 0]
    assert cross_validate(chains, n_boot=0).agreement.macro_f1.value > 0.97
    assert cross_validate(chains, n_boot=0, config=ClassifierConfig(together=1)).agreement.macro_f1.value < 0.8
    assert cross_validate(chains, n_boot=0, units="spans").agreement.macro_f1.value > 0.97


def test_no_task_stands_on_both_sides_of_a_fold():
    """Each task has words of its own that give its label away: a second chain on it would, too."""
    rng = random.Random(0)
    chains = []
    for i in range(30):
        label = rng.choice(BEHAVIORS)
        for sample in range(3):
            chain = chain_of([(label, f"Task{i} word{i} thing{i}.")] * 4, f"t{i}")
            chains.append(replace(chain, sample=sample))
    config = ClassifierConfig(FeatureWeights(place=0.0))
    assert cross_validate(chains, n_boot=0, units="spans", config=config).agreement.accuracy.value < 0.5


def test_chains_come_in_any_number_and_in_any_order(classifier):
    new = planted(6, seed=2)
    one_by_one = [classifier.probabilities([trace])[0] for trace in new]
    for a, b in zip(classifier.probabilities(new[::-1]), one_by_one[::-1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert classifier([]) == []
    empty = replace(new[0], response="", response_ids=(), offsets=(), spans=())
    assert classifier([empty, new[0]])[0] == []
    assert classifier.probabilities([empty])[0].shape == (0, 6)
    again = fit_classifier(planted())
    np.testing.assert_array_equal(again.linear.coefficients, classifier.linear.coefficients)


@pytest.mark.medium
def test_two_labels_and_rare_ones():
    two = planted(20, labels=("deduction", "backtracking"))
    found = fit_classifier(two)
    assert found.labels == ("deduction", "backtracking")
    assert agreement(two, annotate(two, found)).accuracy.value > 0.97
    # A label of one task only: in its fold, no training chain has it.
    rare = [*planted(10, labels=BEHAVIORS[:2]), chain_of([(BEHAVIORS[5], "Wait, no.")] * 3, "rare")]
    report = cross_validate(rare, units="spans", n_boot=0)
    assert report.agreement.per_label[5].recall.value == 0
    assert fit_classifier(rare).labels == (*BEHAVIORS[:2], BEHAVIORS[5])


def test_a_classifier_survives_the_disk(classifier, tmp_path):
    path = tmp_path / "sub" / "classifier.safetensors"
    kept = replace(classifier, abstain=0.25)
    kept.save(path)
    loaded = SentenceClassifier.load(path)
    new = planted(3, seed=4)
    for a, b in zip(kept.probabilities(new), loaded.probabilities(new), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    assert loaded(new) == kept(new)
    assert (loaded.labels, loaded.abstain, loaded.layer) == (kept.labels, 0.25, None)
    assert loaded.provenance == json.loads(json.dumps(kept.provenance))
    assert loaded.provenance["lensteer"] == ls.__version__


KIND = ("lensteer-classifier", "classifier")


def test_corrupt_and_foreign_files_are_refused(classifier, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "c.safetensors"
    classifier.save(path)
    whole = path.read_bytes()
    with pytest.raises(LensteerError, match="no classifier at"):
        SentenceClassifier.load(tmp_path / "nowhere")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LensteerError, match="truncated or no safetensors"):
        SentenceClassifier.load(path)
    path.write_bytes(b"not a file of this kind")
    with pytest.raises(LensteerError, match="truncated or no safetensors"):
        SentenceClassifier.load(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(LensteerError, match="holds no classifier"):
        SentenceClassifier.load(path)
    path.write_bytes(whole)
    tensors, header = read_tensors(path, *KIND)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}

    def write(arrays, header):
        write_tensors(
            path, {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}, header, *KIND
        )

    terms = {**header["terms"], "words": header["terms"]["words"][1:]}
    for name, changed, message in [
        ("intercept", np.zeros(3), "intercept have shape"),
        ("coefficients", arrays["coefficients"] * np.nan, "coefficients are not all finite"),
        ("bias", arrays["bias"].astype(np.float32), "bias are not all finite"),
        ("lengths", np.zeros((1, 1)), "lengths have shape"),
        ("labels", ["deduction", "musing"], "coefficients have shape .* for 2 labels"),
        ("terms", {"words": []}, "terms of"),
        ("terms", terms, "idf.words have shape"),
        ("weights", {"odd": 1.0}, "unknown fields"),
        ("provenance", None, "None is no object"),
        ("format", 9, "has format 9"),
    ]:
        mixed = ({**arrays, name: changed}, header) if name in arrays else (arrays, {**header, name: changed})
        write(*mixed)
        with pytest.raises(LensteerError, match=message):
            SentenceClassifier.load(path)
    write({**arrays, "coefficients": arrays["coefficients"][:, 1:]}, header)
    with pytest.raises(LensteerError, match="coefficients per label"):
        SentenceClassifier.load(path)(planted(1))


def test_user_errors_name_what_is_wrong(classifier):
    chains = planted(6)
    bare = [replace(chain, spans=()) for chain in chains]
    for call, message in [
        (lambda: fit_classifier(bare), "0 of 6 traces have spans"),
        (lambda: fit_classifier(chains[:3]), "3 task"),
        (lambda: fit_classifier(planted(6, labels=BEHAVIORS[:1])), "at least two behaviors"),
        (lambda: fit_classifier(chains, layer=2), "no model with layer=2"),
        (lambda: fit_classifier(chains, abstain=1.5), "abstain=1.5"),
        (lambda: cross_validate(chains, units="words"), "units='words'"),
        (lambda: ClassifierConfig(n_folds=1), "n_folds=1"),
        (lambda: ClassifierConfig(strength=0.0), "strength=0"),
        (lambda: ClassifierConfig(balance=2.0), "balance=2"),
        (lambda: ClassifierConfig(together=0), "together=0"),
        (
            lambda: fit_classifier(chains, config=ClassifierConfig(FeatureWeights(*[0.0] * 4), n_folds=2)),
            "no features under",
        ),
        (lambda: FeatureWeights(words=-1.0), "words=-1.0"),
        (lambda: FeatureWeights(*[0.0] * 5), "all feature weights are 0"),
    ]:
        with pytest.raises(LensteerError, match=message):
            call()


def test_tfidf_is_the_textbooks():
    chains = [Chain(planted(1)[0], ((0, 5),)), Chain(planted(1)[0], ((0, 5),))]
    a = replace(chains[0].trace, response="Wait 12 a-b Wait", response_ids=(), offsets=(), spans=())
    b = replace(chains[0].trace, response="Wait, 7 wait", response_ids=(), offsets=(), spans=())
    chains = [Chain(a, ((0, 16),)), Chain(b, ((0, 12),))]
    weights = FeatureWeights(opening=0.0, place=0.0, neighbors=0.0)
    vocabulary = learn_vocabulary(chains, weights, None)
    assert tokens(a.response) == ["wait", "0", "a", "-", "b", "wait"]
    assert vocabulary.terms == {"words": ("0", "wait")}
    # (1 + log tf) · idf with idf = log((1 + n) / (1 + df)) + 1 = 1 for both, then length 1
    expected = np.array([[1, 1 + np.log(2)]] * 2) / np.hypot(1, 1 + np.log(2))
    np.testing.assert_allclose(features(chains, vocabulary, weights, None).toarray(), expected)


def test_calibration_recovers_a_known_scale_and_prior():
    rng = np.random.default_rng(0)
    bias = np.array([1.0, 0.0, -1.0])
    scores = rng.normal(size=(20000, 3)) * 3
    p = np.exp(0.4 * scores + bias)
    truth = np.array([rng.choice(3, p=row / row.sum()) for row in p])
    found = fit_scaling(scores, truth)
    assert found.scale == pytest.approx(0.4, abs=0.02)
    np.testing.assert_allclose(found.bias - found.bias.mean(), bias, atol=0.1)
    np.testing.assert_allclose(fit_scaling(scores[:0], truth[:0]).bias, 0)


@pytest.fixture(scope="module")
def organism_chains(organism):
    tasks = ls.load_tasks(split="train", n=24)
    return annotate(ls.generate_traces(organism, tasks, temperature=1.0, max_new_tokens=300), ls.grammar)


@pytest.mark.medium
def test_the_residual_stream_alone_tells_the_organisms_behaviors(organism, organism_chains, tmp_path):
    """No word is read: what is right comes from the model's own activations."""
    config = ClassifierConfig(FeatureWeights(*[0.0] * 4), n_folds=4)
    found = fit_classifier(organism_chains, model=organism, layer=4, config=config)
    assert found.provenance["cross_validated"]["sentences"]["macro_f1"][0] > 0.8
    assert found.provenance["model"]["name"] == "organism"
    path = tmp_path / "c.safetensors"
    found.save(path)
    loaded = SentenceClassifier.load(path, model=organism)
    for a, b in zip(loaded.probabilities(organism_chains[:3]), found.probabilities(organism_chains[:3]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    again = annotate(organism_chains, loaded)
    assert agreement(organism_chains, again).accuracy.value > 0.95
    without = SentenceClassifier.load(path)
    assert without.layer == 4
    with pytest.raises(LensteerError, match="load it with model="):
        without(organism_chains[:1])


@pytest.mark.medium
def test_a_classifier_of_another_model_is_refused(organism_chains, organism, tiny_model, classifier, tmp_path):
    found = fit_classifier(organism_chains, model=organism, layer=2, config=ClassifierConfig(n_folds=2))
    found.save(tmp_path / "c")
    with pytest.raises(LensteerError, match="trained with 'organism', and the model given differs in"):
        SentenceClassifier.load(tmp_path / "c", model=tiny_model())
    with pytest.raises(LensteerError, match="reads text only"):
        replace(classifier, model=organism)
    with pytest.raises(LensteerError, match="no layer 99"):
        fit_classifier(organism_chains, model=organism, layer=99)
    with pytest.raises(LensteerError, match="a model with layer=None"):
        fit_classifier(organism_chains, model=organism)


@pytest.mark.medium
def test_the_analysis_answers_its_question_on_any_annotated_chains(tmp_path):
    path = Path(__file__).resolve().parent.parent / "analyses" / "annotation_classifier.py"
    spec = importlib.util.spec_from_file_location("analyses_annotation_classifier", path)
    analysis = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = analysis  # dataclasses look their module up
    spec.loader.exec_module(analysis)
    chains = tmp_path / "chains.jsonl"
    rows = [{"response": t.response, "annotated": write_published(t)} for t in planted(15, noise=0.2)]
    chains.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("words alone (TF-IDF)",)
    result = analysis.main(analysis.Config(chains, (5, 12), settings, (0.5,), rules_saw=5, n_boot=50))
    default, alone = result.rows[0], result.rows[-2]
    assert (default.setting, default.units, default.ahead) == ("default", "spans", (0, 0, 0))
    assert alone.ahead[0] == pytest.approx(default.macro_f1.value - alone.macro_f1.value)
    assert {r.setting for r in result.rows} >= {"cue rules, on the same", *settings}
    (twins,) = result.twins
    assert twins.chance < twins.same < 1
    assert result.curve[5][0] < result.curve[12][0] + 0.1
    assert f"{default.macro_f1.value:.3f}" in analysis.table(result)


@pytest.mark.medium
def test_on_the_published_chains_it_beats_words_alone(reference_folder):
    """Five folds by chain on the judge's spans: measured .593; words alone .528."""
    traces, _ = read_published(reference_folder / "r1_qwen_1.5b_annotated_chains.jsonl")
    found = cross_validate(traces, units="spans", n_boot=200)
    assert found.agreement.macro_f1.value >= 0.56
    assert found.agreement.kappa.value >= 0.45
    assert found.calibration_error < 0.05

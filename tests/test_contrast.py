"""Directions from pairs: against a slow oracle and a planted answer; formats, positions, and whatever can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lensteer as ls
from lensteer import activations, models
from lensteer.contrast import FORMATS, POSITIONS, Pair, Position, Text, complete_pairs, load_pairs, pair_traces, pair_up
from lensteer.contrast import fit_directions as fit
from lensteer.contrast.fitting import encode_text
from lensteer.errors import LensteerError
from lensteer.vectors import BehaviorVectors
from lensteer.vectors.components import principal_component
from lensteer.vectors.constructions import PAIR_CONSTRUCTIONS, Recipe
from reference import slow_pair_differences, slow_principal_component

PROMPTS = ["Is three right?", "For example, take four.", "The answer is so?", "Wait, maybe.", "I am not sure about it"]
KIND = [Pair(Text(p, f"Yes, {p} I think so."), Text(p, "No."), "kind") for p in PROMPTS]
LOUD = [Pair(Text(p, system="Be loud."), Text(p, system="First, be wrong."), "loud") for p in PROMPTS[:3]]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def no_forward(monkeypatch):
    """Fails where a forward begins."""

    def ran(*_):
        raise AssertionError("a forward has begun")

    monkeypatch.setattr(activations, "_averaged", ran)


def chat_ids(model, prompt, completion="", system=""):
    """By hand, from the template in conftest."""
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    bos = "<|endoftext|>" if "bos_token" in model.tokenizer.chat_template else ""
    text = f"{bos}{head}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    encode = lambda words: model.tokenizer(words, add_special_tokens=False).input_ids  # noqa: E731 - a name in a helper
    return encode(text), encode(completion)


# --- the direction --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_every_construction_is_the_slow_oracles(tiny_model, family):
    model = tiny_model(family)
    slow = []
    for pair in KIND:
        sides = [chat_ids(model, t.prompt, t.completion) for t in (pair.positive, pair.negative)]
        slow.append([(p + c, range(len(p), len(p) + len(c))) for p, c in sides])
    differences = slow_pair_differences(model, slow)
    scale = differences.abs().mean()
    found = {name: fit(model, KIND, construction=name, batch_size=3)["kind"].raw for name in PAIR_CONSTRUCTIONS}
    assert (found["difference"] - differences.mean(0)).abs().max() < 1e-4 * scale
    for layer in range(4):
        truth = slow_principal_component(differences[:, layer])
        assert (found["pca"][layer] - truth).abs().max() < 1e-3 * scale
        normal = found["logistic"][layer].double() / found["logistic"][layer].double().norm()
        gap = normal @ differences[:, layer].mean(0)
        assert float(found["logistic"][layer].norm()) == pytest.approx(float(gap), rel=1e-3)  # the classes' distance
    cosines = torch.cosine_similarity(found["pca"], found["logistic"], dim=-1)
    assert cosines.max() < 0.999


def test_a_direction_that_a_hook_adds_to_one_side_is_recovered(model):
    planted = torch.randn(32, generator=torch.Generator().manual_seed(0))
    mark = models.encode(model, "7")[0]
    pairs = pair_up([f"7 {p}" for p in PROMPTS], [f"4 {p}" for p in PROMPTS], label="seven")
    seen = []

    def watch(_module, args, kwargs):
        seen.append(kwargs.get("input_ids", args[0] if args else None))

    def plant(resid, hook):
        marked = (seen[-1] == mark).any(1)
        return resid + marked[:, None, None] * planted

    plain = fit(model, pairs)["seven"]
    handle = model.original_model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", plant)]):
            found = {name: fit(model, pairs, construction=name)["seven"] for name in PAIR_CONSTRUCTIONS}
    finally:
        handle.remove()
    moved = found["difference"].raw - plain.raw
    torch.testing.assert_close(moved[0], torch.zeros(32), rtol=0, atol=1e-4)
    torch.testing.assert_close(moved[1], planted, rtol=1e-4, atol=1e-4)
    strong = 100 * planted  # beside which the words' own difference is nothing
    planted, handle = strong, model.original_model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", plant)]):
            found = {name: fit(model, pairs, construction=name)["seven"] for name in ("difference", "pca")}
    finally:
        handle.remove()
    for direction in found.values():
        assert torch.cosine_similarity(direction.at(1), strong, 0) > 0.99
        assert float(direction.at(1).norm()) == pytest.approx(float(strong.norm()), rel=0.05)
        assert torch.cosine_similarity(direction.at(0), strong, 0).abs() < 0.9


def test_the_principal_component_keeps_what_all_pairs_have_in_common():
    generator = torch.Generator().manual_seed(1)
    common, other = torch.eye(40, dtype=torch.float64)[:2]
    noise = torch.randn(30, 40, generator=generator, dtype=torch.float64)
    differences = 5 * common + 0.1 * noise + torch.randn(30, 1, generator=generator, dtype=torch.float64) * other
    found = principal_component(differences)  # centered differences would give `other`
    assert torch.cosine_similarity(found, common, 0) > 0.99
    torch.testing.assert_close(principal_component(-differences), -found)
    weights = torch.zeros(30, dtype=torch.float64)
    assert principal_component(differences, weights).isnan().all()
    weights[3] = 2
    torch.testing.assert_close(principal_component(differences, weights), differences[3])
    for few in (differences[:, :8], differences[:4]):  # both Gram matrices
        torch.testing.assert_close(principal_component(few), slow_principal_component(few))


@pytest.mark.medium
def test_batches_and_order_change_nothing_and_each_distinct_text_is_run_once(model, monkeypatch):
    pairs = [*KIND, *(replace(pair, negative=KIND[0].negative) for pair in KIND[1:])]
    options: dict[str, Any] = dict(n_controls=3, n_bootstrap=6, seed=2)
    ran = []
    real = activations._averaged
    monkeypatch.setattr(activations, "_averaged", lambda m, texts, *rest: ran.extend(texts) or real(m, texts, *rest))
    one = fit(model, pairs, batch_size=1, **options)
    assert len(ran) == len(set(ran)) == 10
    for construction in PAIR_CONSTRUCTIONS:
        one = fit(model, pairs, batch_size=1, construction=construction, **options)
        other = fit(model, pairs[::-1], batch_size=4, construction=construction, **options)
        assert one.provenance == other.provenance
        for name, tensor in one._tensors().items():
            torch.testing.assert_close(other._tensors()[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    some = fit(model, pairs, layers=[3, 1])
    torch.testing.assert_close(some.raw, fit(model, pairs).raw[:, [3, 1]], rtol=1e-4, atol=1e-5)


def test_several_concepts_and_what_the_vectors_say_of_themselves(model, tmp_path):
    pairs = [*KIND, *(replace(pair, label="more") for pair in KIND[:2])]
    vectors = fit(model, pairs, n_controls=2, n_bootstrap=8)
    assert vectors.labels == ("kind", "more")
    assert vectors.counts == {"kind": 5, "more": 2}
    assert vectors.n_traces == 7
    assert vectors.recipe == Recipe("answer", "pairs", "span")
    assert str(vectors.recipe) == "answer of pairs"
    torch.testing.assert_close(vectors["kind"].raw, fit(model, KIND)["kind"].raw, rtol=1e-4, atol=1e-5)
    assert vectors.controls.shuffled.shape == (2, 2, 4, 32)
    assert vectors.provenance["model"] == models.fingerprint(model).to_dict()
    assert 0 < len(vectors.replicates) <= 8  # of two pairs, a share exp(-2) draws neither
    for construction in PAIR_CONSTRUCTIONS:
        fitted = fit(model, pairs, construction=construction, n_controls=2)
        fitted.save(tmp_path / "v.safetensors")
        loaded = BehaviorVectors.load(tmp_path / "v.safetensors", model)
        assert torch.equal(loaded.raw, fitted.raw)
        assert loaded.recipe == fitted.recipe
        assert loaded.provenance == fitted.provenance
        assert loaded.counts == fitted.counts
    assert ls.cosine_matrix(vectors, 2).at("kind", "more") > 0
    with ls.SteeringPlan(loaded["kind"], 2, 1.0).on(model):
        pass
    assert len(loaded.random("shuffled", "more")) == 2


def test_mean_norm_is_of_the_completions_or_of_the_prompts_without_their_first_token(model):
    for pairs, part in ((KIND[:1], "completion"), (LOUD[:1], "prompt")):
        means = []
        for text in (pairs[0].positive, pairs[0].negative):
            prompt, answer = chat_ids(model, text.prompt, text.completion, text.system)
            ids = torch.tensor([prompt + answer])
            _, cache = model.run_with_cache(ids, attention_mask=torch.ones_like(ids))
            rows = cache["blocks.2.hook_resid_post"][0]
            means.append(rows[len(prompt) :].mean(0) if part == "completion" else rows[1:].mean(0))
        truth = torch.stack(means).mean(0).norm()
        assert float(fit(model, pairs).mean_norm[2]) == pytest.approx(float(truth), rel=1e-4)


def test_shuffled_controls_are_pairs_with_their_sides_changed_over(model):
    vectors = fit(model, KIND, n_controls=8)
    sides = [[chat_ids(model, t.prompt, t.completion) for t in (p.positive, p.negative)] for p in KIND]
    slow = slow_pair_differences(model, [[(p + c, range(len(p), len(p) + len(c))) for p, c in pair] for pair in sides])
    signs = torch.linalg.lstsq(slow[:, 3].T, vectors.controls.shuffled[:, 0, 3].double().T).solution * len(KIND)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), rtol=0, atol=1e-3)
    assert len({tuple(column.sign().tolist()) for column in signs.T}) > 3
    component = fit(model, KIND, construction="pca", n_controls=8)  # would not change if sides did: pairs are redrawn
    cosines = torch.cosine_similarity(component.controls.shuffled[:, 0, 3], component.raw[0, 3], dim=-1)
    assert cosines.abs().max() < 0.999


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_where_every_position_is(tiny_model, family):
    model = tiny_model(family)
    text = Text("Is three right?", "So (A).")
    prompt, answer = chat_ids(model, text.prompt, text.completion)
    _, encoded = encode_text(model, text)
    assert encoded.ids == tuple(prompt + answer)
    n, m = len(prompt), len(prompt) + len(answer)
    letter = next(i for i in range(n, m) if "A" in model.tokenizer.decode([encoded.ids[i]]))
    three = max(i for i in range(n) if "three".endswith(model.tokenizer.decode([encoded.ids[i]]).strip() or "?"))
    assert letter < m - 1
    specs: dict[Any, tuple[int, int]] = {
        "last_prompt": (n - 1, n),
        "prompt": (1, n),
        "answer": (n, m),
        "letter": (letter, letter + 1),
        "last": (m - 1, m),
        5: (5, 6),
        -2: (m - 2, m - 1),
        "-2": (m - 2, m - 1),
        "token:three": (three, three + 1),
    }
    for spec, bounds in specs.items():
        assert Position.parse(spec).bounds(model, encoded) == bounds, spec
        assert Position.parse(str(Position.parse(spec))) == Position.parse(spec)
    assert set(POSITIONS) == {"last_prompt", "prompt", "answer", "letter", "last"}


def test_a_raw_text_gets_the_bos_that_its_tokenizer_writes_and_no_second_one(tiny_model):
    for family, head in (("qwen2", []), ("llama", [0])):
        model = tiny_model(family)
        _, encoded = encode_text(model, Text("Wait, maybe", " not", raw=True))
        assert encoded.ids == (*head, *models.encode(model, "Wait, maybe"), *models.encode(model, " not"))
    _, again = encode_text(model, Text("<|endoftext|>Wait", raw=True))
    assert again.ids == (0, *models.encode(model, "Wait"))


def test_where_pairs_are_read_if_nobody_says(model):
    for pairs, name in [(KIND, "answer"), (LOUD, "last_prompt"), ([replace(KIND[0], position="last")], "last")]:
        assert fit(model, pairs).recipe.window == name
    assert fit(model, KIND, position="token:s").recipe.window == "token:s"
    assert fit(model, KIND, position=-1).recipe.window == "-1"


# --- formats --------------------------------------------------------------------------------------

CAA = [
    {"question": "Is it?\n (A) Yes\n (B) No", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
]
TRAIT: dict[str, Any] = {"instruction": [{"pos": "Lie.", "neg": "Be true."}, {"pos": "Be sly.", "neg": "Be open."}],
         "questions": ["Who?", "Why?"], "eval_prompt": "Rate it."}  # fmt: skip
SAID = {"positive": "Hi.", "negative": "Go."}


def lines(*entries):
    return "\n".join(json.dumps(entry) for entry in entries)


@pytest.mark.parametrize(
    ("name", "content", "pairs"),
    [
        ("kind.jsonl", lines(SAID), [Pair(Text("Hi."), Text("Go."), "kind")]),
        ("kind.jsonl", lines(SAID, {**SAID, "concept": "warm"}, {**SAID, "label": "cold"}),
         [Pair(Text("Hi."), Text("Go."), label) for label in ("kind", "warm", "cold")]),
        ("kind.jsonl", lines({"prompt": "Q", **SAID}), [Pair(Text("Q", "Hi."), Text("Q", "Go."), "kind")]),
        ("kind.jsonl", lines({"positive": {"prompt": "Q", "completion": "Hi.", "system": "S"},
                              "negative": {"prompt": "Q", "system": "T"}}),
         [Pair(Text("Q", "Hi.", "S"), Text("Q", "", "T"), "kind")]),
        ("kind.jsonl", lines({"raw": True, **SAID}), [Pair(Text("Hi.", raw=True), Text("Go.", raw=True), "kind")]),
        ("evil/generate_dataset.json", json.dumps(CAA),
         [Pair(Text(CAA[0]["question"], "(A)"), Text(CAA[0]["question"], "(B)"), "evil", "letter")]),
        ("agree.jsonl", lines({"question": "Is it?", "statement": "It is.", "answer_matching_behavior": " Yes",
                               "answer_not_matching_behavior": " No"}),
         [Pair(Text("Is it?", "Yes"), Text("Is it?", "No"), "agree", "letter")]),
        ("lying.json", json.dumps(TRAIT, indent=2),
         [Pair(Text(q, system=i["pos"]), Text(q, system=i["neg"]), "lying")
          for q in TRAIT["questions"] for i in TRAIT["instruction"]]),
        ("list.json", json.dumps([SAID]), [Pair(Text("Hi.", raw=True), Text("Go.", raw=True), "list", "last")]),
    ],
)  # fmt: skip
def test_files_of_every_format(tmp_path, name, content, pairs):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    assert load_pairs(path) == load_pairs(str(path)) == pairs
    assert {pair.label for pair in load_pairs(path, label="x")} <= {"x", "warm", "cold"}


def test_lists_as_repengs_and_as_contrastive_pairs(organism):
    entry = SimpleNamespace(positive="[INST] Hi", negative="[INST] Go")
    raw = [Pair(Text("[INST] Hi", raw=True), Text("[INST] Go", raw=True), position="last")]
    assert load_pairs([entry]) == load_pairs([vars(entry)]) == raw
    assert load_pairs([entry], raw=False)[0].positive == Text("[INST] Hi")
    assert load_pairs([entry], label="x")[0].label == "x"
    from lensteer.cache_steering.pairs import load_records

    made = ls.contrastive_pairs(organism, load_records(), n=1, shots=1)
    (pair,) = load_pairs(made)
    assert pair.positive == Text(made[0].positive, raw=True)


def test_the_written_pairs():
    pairs = load_pairs("politeness")
    assert len(pairs) == len({pair.positive.prompt for pair in pairs}) == 40
    assert {pair.label for pair in pairs} == {"politeness"}
    assert all(pair.positive.prompt == pair.negative.prompt for pair in pairs)
    assert all(pair.positive.answered and pair.negative.answered for pair in pairs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[]", "bad.jsonl is empty"),
        ("not json", "line 1 is not JSON"),
        ("[1]", r"entry 0 has no known format \(it has 1\)"),
        (lines({"chosen": "a", "rejected": "b"}), r"no known format \(it has \['chosen', 'rejected'\]\): a pair has"),
        (lines(SAID, {"positive": "a"}), r"line 2: lacks 'negative' \(it has \['positive'\]\)"),
        (lines(SAID, SAID, {"positive": "a", "negative": " "}), "line 3: 'negative' is ' ': give a text"),
        (lines(SAID, {"positive": "a", "negative": "a"}), "line 2: both sides of a pair of 'bad' are the same, 'a'"),
        (lines(SAID, {**SAID, "promt": "b"}), r"line 2: unknown keys \['promt'\]"),
        (lines(SAID, {**SAID, "label": " "}), "line 2: 'label' is ' '"),
        (lines(SAID, {"positive": {"completion": "a"}, "negative": "b"}), "line 2: 'positive' lacks 'prompt'"),
        (lines(SAID, {"positive": {"prompt": "a", "x": 1}, "negative": "b"}), r"'positive' has unknown keys \['x'\]"),
        (lines(SAID, {**SAID, "raw": "yes"}), "line 2: positive.raw is 'yes'"),
        (lines(SAID, {**SAID, "raw": True, "system": "S"}), "line 2: a raw text with the system prompt 'S'"),
        (json.dumps([*CAA, {"question": "Q"}]), "entry 1: lacks 'answer_matching_behavior'"),
        (json.dumps({**TRAIT, "questions": []}), r"'questions' is '\[\]': give a list that is not empty"),
        (json.dumps({"instruction": TRAIT["instruction"]}), "lacks 'questions'"),
        (json.dumps({**TRAIT, "instruction": [{"pos": "a"}]}), "lacks 'neg'"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(LensteerError, match=message):
        load_pairs(tmp_path / "bad.jsonl")


def test_other_wrong_sources(tmp_path):
    with pytest.raises(LensteerError, match=r"no file .*written sets 'politeness'"):
        load_pairs("rudeness")
    with pytest.raises(LensteerError, match="unknown format 'csv': choose one of 'plain', 'caa', 'persona', 'repeng'"):
        load_pairs("politeness", "csv")
    (tmp_path / "p.jsonl").write_text(lines(SAID))
    with pytest.raises(LensteerError, match="line 1: lacks 'question'"):
        load_pairs(tmp_path / "p.jsonl", "caa")
    assert tuple(FORMATS) == ("plain", "caa", "persona", "repeng")


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (["a", "b"], ["c"], "2 positive and 1 negative texts"),
        ([], [], "no pairs: both lists are empty"),
        (["a", "b"], ["c", ""], "pair 1: an empty prompt"),
        (["a", "b"], ["c", "b"], "pair 1: both sides of a pair of 'contrast' are the same, 'b'"),
        ([Text("q", "a")], [Text("q", "a")], "pair 0: both sides"),
    ],
)
def test_sides_that_make_no_pairs(positive, negative, message):
    with pytest.raises(LensteerError, match=message):
        pair_up(positive, negative)


# --- what is refused before the first forward -----------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "no pairs: the list is empty"),
        (["a"], {}, "entry 0 has no known format"),
        (KIND, dict(position="middle"), "unknown position 'middle': choose one of 'last_prompt'"),
        (KIND, dict(position=0), "position 0 is an attention sink"),
        (KIND, dict(position=999), r"pair 0 \('kind'\), positive side: position '999' is outside the \d+ tokens"),
        (KIND, dict(position="token:zebra"), r"pair 0 \('kind'\), positive side: no 'zebra' in '"),
        (KIND, dict(position="last_prompt"), r"pair 0 \('kind'\): both sides are the same tokens up to where they are"),
        (LOUD, dict(position="answer"), r"pair 0 \('loud'\), positive side: no completion to read 'answer' in"),
        ([*KIND, *LOUD], {}, "pair 0 is read at 'answer' and pair 5 at 'last_prompt': fit them apart"),
        ([Pair(Text("a", "b"), Text("a"))], {}, "pair 0 .* has a completion on one side only"),
        ([*KIND, *pair_up(["Wait. " * 400], ["a"])], dict(position="last"), "pair 5 .*context has 512: shorten 'Wait"),
        (pair_up(["<|im_start|>a"], ["b"]), {}, r"positive side: the prompt '<\|im_start\|>a' holds .*: pass raw=True"),
        (KIND, dict(construction="lda"), "unknown construction 'lda' of pairs: choose one of 'difference', 'pca'"),
        (KIND, dict(layers=[4]), "no layer 4"),
        (KIND, dict(layers=[]), "at least one layer"),
        (KIND, dict(site="attn"), "no site 'attn'"),
        (KIND, dict(batch_size=0), "batch_size=0"),
        (KIND, dict(n_controls=-1), "no negative number"),
    ],
)
def test_refused_before_the_first_forward(model, no_forward, pairs, options, message):
    with pytest.raises(LensteerError, match=message):
        fit(model, pairs, **options)


def test_a_system_prompt_needs_a_template_that_takes_one(tiny_model, no_forward, monkeypatch):
    model = tiny_model()
    assert models.chat_text(model, "Hi", system="Be loud.").startswith("<|im_start|>system\nBe loud.<|im_end|>\n")
    refuses = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' else 'x' }}"
    for template, message in [
        (refuses, "pair 0 .*positive side: .*takes no system prompt .it says: System role not supported"),
        (
            "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}",
            "it ignores it.*'Be loud.'",
        ),
        (None, "has no chat template: pass raw=True"),
    ]:
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
        with pytest.raises(LensteerError, match=message):
            fit(model, LOUD)


def test_spans_have_no_pairs_and_pairs_no_spans(model):
    with pytest.raises(LensteerError, match="construction 'unsupervised_pca' has no behaviors"):
        ls.fit_vectors(model, [], construction="unsupervised_pca")
    with pytest.raises(LensteerError, match="negatives 'pairs' are of pairs, and traces have none: use fit_directions"):
        ls.fit_vectors(model, [], negatives="pairs")
    assert str(Recipe("answer", "pairs", "span", "pca")) == "answer of pairs, pca"


# --- completions, traces, and what follows --------------------------------------------------------


def test_the_model_writes_completions_and_its_own_tokens_are_read(model):
    made = complete_pairs(model, LOUD, max_new_tokens=6, seed=1, batch_size=2)
    assert [pair.label for pair in made] == ["loud"] * 3
    assert made == complete_pairs(model, LOUD, max_new_tokens=6, seed=1, batch_size=64)
    ends = models.end_ids(model)
    for pair in made:
        for text in (pair.positive, pair.negative):
            assert 0 < len(text.completion_ids) <= 6
            assert not ends & set(text.completion_ids)
            assert encode_text(model, text)[1].ids[-len(text.completion_ids) :] == text.completion_ids
    assert complete_pairs(model, made) == made  # nothing left to write
    assert fit(model, made).recipe.window == "answer"
    with pytest.raises(LensteerError, match="0 pairs, batch_size=64"):
        complete_pairs(model, [])


def test_empty_answers_are_left_out_and_said(model, monkeypatch):
    from lensteer.generation import Generated, jobs

    answers = iter([Generated((2,), True), *[Generated((40, 41), False)] * 5])
    monkeypatch.setattr(jobs, "generate", lambda m, prompts, **_: [next(answers) for _ in prompts])
    with pytest.warns(UserWarning, match="1 of 3 pairs left out: an empty answer"):
        assert len(complete_pairs(model, LOUD)) == 2
    monkeypatch.setattr(jobs, "generate", lambda m, prompts, **_: [Generated((2,), True) for _ in prompts])
    with pytest.raises(LensteerError, match="answers to all 3 pairs are empty"):
        complete_pairs(model, LOUD)


def test_pairs_become_traces_that_are_attributed_and_steered(model):
    traces = pair_traces(model, KIND)
    for trace, pair in zip(traces, KIND, strict=True):
        (span,) = trace.spans
        prompt, answer = chat_ids(model, pair.positive.prompt, pair.positive.completion)
        assert trace.ids == tuple(prompt + answer)
        assert (span.label, span.onset, span.end) == ("kind", len(prompt) - 1, len(prompt) + len(answer))
        assert trace.response == pair.positive.completion
        assert (span.char_start, span.char_end) == (0, len(trace.response))
    parts = pair_traces(model, KIND, spans="sentence", negatives=True)
    assert [t.spans[0].label for t in parts] == ["kind", "not kind"] * 5
    assert [t.response[s.char_start : s.char_end] for t in parts[:1] for s in t.spans] == [
        "Yes, Is three right?",
        "I think so.",
    ]
    vectors = fit(model, KIND, n_controls=2)
    scores = ls.attribute(model, traces, vectors, coefficient=0.1)
    assert scores.labels == ("kind",)
    site = ls.select_layers(scores, ls.embedding_overlap(model, vectors))
    plan = ls.SteeringPlan(vectors["kind"], layer=site["kind"], coefficient=1.0, scope=ls.generated)
    task = ls.Task("t", "x", "test", "Is it?")
    with plan.on(model):
        (steered,) = ls.generate_traces(model, [task], max_new_tokens=3)
    assert len(steered.response_ids) == 3
    ls.attribute(model, parts, vectors, method="signed", n_controls=2)
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(spans="word"), "unknown spans 'word'"),
        (dict(pairs=[]), "no pairs"),
        (dict(pairs=LOUD), r"pair 0 \('loud'\) has no completion to make a trace of"),
    ]
    for options, message in wrong:
        with pytest.raises(LensteerError, match=message):
            pair_traces(model, **{"pairs": KIND, **options})


def test_the_command_writes_vectors(model, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    from lensteer import cli

    (tmp_path / "warmth.jsonl").write_text(lines({"prompt": "Q?", **SAID}, {"prompt": "Who?", **SAID}))
    out = tmp_path / "warm.safetensors"
    words = ["lensteer", "directions", tmp_path / "warmth.jsonl", "--out", out, "--model", tiny_checkpoint()]
    monkeypatch.setattr("sys.argv", [*map(str, words), "--n-controls", "2", "--construction", "pca"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().out
    assert stop.value.code in (0, None)
    assert "warmth: 2 pairs, 4 layers, answer of pairs, pca" in said
    assert str(out.resolve()) in said
    vectors = BehaviorVectors.load(out, model)
    assert vectors.labels == ("warmth",)
    assert len(vectors.controls.isotropic) == 2


# --- on language ----------------------------------------------------------------------------------


@pytest.mark.medium
def test_politeness_steers_smollm2(real_model):
    model = real_model("smollm2")
    vectors = fit(model, load_pairs("politeness"), layers=[15])
    ids = models.encode(model, models.chat_text(model, "My parcel is late."))
    polite, curt = (models.encode(model, word)[0] for word in ("Thank", "No"))
    odds = []
    for coefficient in (-1.0, 0.0, 1.0):
        plan = ls.SteeringPlan(vectors["politeness"], 15, coefficient)
        with torch.no_grad(), plan.on(model):
            logits = model(torch.tensor([ids]))[0, -1]
        odds.append(float(logits[polite] - logits[curt]))
    assert odds[0] < odds[1] < odds[2]
    assert odds[2] - odds[0] > 1

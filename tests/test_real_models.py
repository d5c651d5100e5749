"""What the tiny checkpoints and the organism cannot show: a real model's weights, tokenizer, template and thinking."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lensteer as ls
from lensteer import models, twins
from lensteer.attribution import attribute
from lensteer.forward import forced_logits
from lensteer.generation import generate
from lensteer.positions import everywhere, generated
from lensteer.steering import SteeringPlan, foreign_hooks
from lensteer.steering.plans import UNITS

pytestmark = pytest.mark.medium  # loads real models

QUESTION = "A farmer has 3 rows of 4 trees. How many trees are there?"


@pytest.fixture(scope="module")
def model(real_model):
    return real_model("mini-r1")


def test_it_loads_and_says_who_it_is(model, real_model):
    mine, base = models.fingerprint(model), models.fingerprint(real_model("smollm2"))
    assert (mine.name, mine.n_layers, mine.d_model) == ("mini-r1", 30, 576)
    assert mine == models.fingerprint(model)
    assert set(mine.differences(vars(base))) == {"weights", "tokenizer", "template"}  # it is the other one, trained on
    assert twins.plain_twin(model) is not None


def test_its_prompt_ends_in_an_opened_thought(model, real_model):
    text = models.chat_text(model, QUESTION)
    assert text.endswith(f"{models.OPEN_THINKING}\n")
    assert not models.chat_text(real_model("smollm2"), QUESTION).rstrip().endswith(models.OPEN_THINKING)
    ids, table = models.encode(model, text), models.token_table(model)
    assert models.decode_offsets(model.tokenizer, ids)[0] == text
    opens, closes = (mark.whole for mark in table.thought)
    assert int(opens[ids].sum()) == 1  # the tag is one token, and no token of the question
    assert int(opens.sum()) == int(closes.sum()) == 1
    assert not models.end_ids(model) & set(ids[-2:])


@pytest.mark.slow
def test_a_coefficient_of_zero_is_the_unsteered_run_in_the_same_batch(model, random_direction):
    ids = models.encode(model, models.chat_text(model, QUESTION))
    zero = SteeringPlan(random_direction(model), 12, 0.0, everywhere)
    strong = SteeringPlan(random_direction(model, length=60.0), 12, 1.0, generated)
    options: dict[str, Any] = dict(max_new_tokens=16, temperature=0.6)
    plain = generate(model, [ids] * 4, seeds=[1, 2, 1, 2], **options)
    mixed = generate(model, [ids] * 4, seeds=[1, 2, 1, 2], plans=[zero, None, None, strong], **options)
    assert mixed[:3] == plain[:3]
    assert mixed[3] != plain[3]
    assert plain[0] != plain[1]
    rows = [[5, 6, 7, 8]] * 2
    still, same = (forced_logits(model, [ids] * 2, rows, plans=plans) for plans in (None, [zero, None]))
    assert all(torch.equal(a, b) for a, b in zip(still, same, strict=True))
    assert not foreign_hooks(model)


@pytest.mark.slow
def test_all_units_steer_along_vectors_of_its_own_chains(model):
    tasks = ls.load_tasks("builtin", split="train", n=4)
    traces = ls.annotate(ls.generate_traces(model, tasks, max_new_tokens=80, temperature=0.6), ls.annotation.rules)
    assert all(models.OPEN_THINKING in trace.prompt for trace in traces)
    labels = [b for b in ls.BEHAVIORS if any(span.label == b for trace in traces for span in trace.spans)]
    assert len(labels) > 1
    vectors = ls.fit_vectors(model, traces, layers=[12, 20], behaviors=labels)
    label = vectors.labels[0]
    scores = [
        attribute(model, traces, vectors, behaviors=[label], layers=[12, 20], unit=unit, max_spans=4, spans="all")
        for unit in UNITS
    ]
    assert all((found.mean > 0).all() for found in scores)
    for unit, found in zip(UNITS, scores, strict=True):  # as long as what a plan of that unit adds
        plan = SteeringPlan(vectors[label], 20, unit=unit)
        share = float(plan.vector.norm() / vectors.mean_norm[1])
        assert float(found.relative_length[0, 1]) == pytest.approx(share, rel=1e-4)

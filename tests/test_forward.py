"""One way to run a model: a plan that is on means the same in every function, and one place calls the model."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lensteer as ls
from lensteer import models
from lensteer.ablation import ForcedChain
from lensteer.cache_steering import CachePlan, CacheVector
from lensteer.cache_steering.fitting import read_slots
from lensteer.forward import Forward, forced_logits, left_padded, right_padded
from lensteer.generation import decode, generate
from lensteer.vectors import Recipe
from lensteer.vectors.projections import all_projections
from test_attention import chain

LAYER = 1
SCOPES = (ls.onsets, ls.thinking, ls.generated, ls.prompt, ls.everywhere, ls.at([3, 7]))


@pytest.fixture(scope="module")
def trace():
    return chain(0, n_spans=8)


def logits_of_response(model, trace):
    return forced_logits(model, [trace.prompt_ids], [trace.response_ids])[0]


def fitted(model, trace):
    return ls.fit_vectors(model, [trace], window="span", negatives="all").raw


def attended(model, trace):
    return ls.sentence_attention(model, trace).values


def projected(model, trace):
    return ls.token_projections(model, trace, direction_of(model), 2).values


def all_projected(model, trace):
    vectors = ls.BehaviorVectors(
        raw=direction_of(model).raw[None],
        mean_norm=direction_of(model).mean_norm,
        labels=("planted",),
        layers=tuple(range(models.n_layers(model))),
        counts={"planted": 1},
        n_traces=1,
        recipe=Recipe(),
        provenance={},
    )
    return all_projections(model, trace, vectors)


def forced(model, trace):
    effect = ForcedChain.of(model, trace).effect(ls.SteeringPlan(direction_of(model), 2, 0.5, ls.everywhere))
    return torch.stack([effect.kl, effect.change])


def slots(model, trace):
    return torch.stack(read_slots(model, [trace.prompt_ids], [len(trace.prompt_ids) - 2]))


def greedy(model, trace):
    (found,) = generate(model, [trace.prompt_ids], max_new_tokens=6)
    return torch.tensor(found.ids).double()


def continued(model, trace):
    options: dict[str, Any] = dict(max_new_tokens=6, prompt_lengths=[trace.prompt_length])
    return torch.tensor([step.tokens for step in decode(model, [trace.ids], **options)]).double()


FUNCTIONS = (logits_of_response, fitted, attended, projected, all_projected, forced, slots, greedy, continued)


def direction_of(model, seed=0, length=3.0):
    raw = torch.randn(models.n_layers(model), models.d_model(model), generator=torch.Generator().manual_seed(seed))
    raw = length * raw / raw.norm(dim=-1, keepdim=True)
    layers = tuple(range(models.n_layers(model)))
    return ls.Direction("planted", raw, torch.ones(len(layers)), layers)


@pytest.mark.parametrize("scope", SCOPES, ids=lambda s: s.name)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_plan_that_is_on_acts_where_its_scope_says_in_every_function(function, scope, family, trace, tiny_model):
    """Against a hook written by hand, which adds the vector at the positions that the scope has in this chain."""
    model, plan = tiny_model(family), None
    plan = ls.SteeringPlan(direction_of(model, 1), LAYER, 1.0, scope)
    plain = function(model, trace)
    with plan.on(model):
        found = function(model, trace)
    seen = {"ids": torch.zeros(1, 0, dtype=torch.long)}

    def note(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        past = kwargs.get("past_key_values")
        before = 0 if past is None else past.get_seq_length()
        known = torch.tensor([trace.ids])[:, :before] if before > seen["ids"].shape[1] else seen["ids"][:, :before]
        seen["ids"] = torch.cat([known.expand(len(ids), -1), ids], 1)

    def add(resid, hook):
        text = right_padded(model, seen["ids"].tolist(), [trace.prompt_length] * len(seen["ids"]))
        chosen = scope.mask(text)[:, -resid.shape[1] :, None]
        return torch.where(chosen, resid + plan.vector, resid)

    handle = model.original_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with model.hooks(fwd_hooks=[(models.resid_hook(LAYER), add)]):
            wanted = function(model, trace)
    finally:
        handle.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4, equal_nan=True)
    if function not in (greedy, continued) and not (function is slots and scope is not ls.everywhere):
        reached = scope.mask(right_padded(model, [trace.ids], [trace.prompt_length])).any()
        assert bool((found - plain).nan_to_num().abs().max() > 1e-3) is bool(reached)  # the plan does something


@pytest.mark.parametrize("function", [fitted, attended, projected, all_projected], ids=lambda f: f.__name__)
def test_a_cache_plan_is_refused_where_a_chain_is_read_in_one_pass(function, trace, tiny_model):
    model = tiny_model("qwen2")
    shape = read_slots(model, [trace.prompt_ids], [2])[0][0].shape
    plan = CachePlan(CacheVector("v", torch.ones(shape), torch.ones(shape), "last_prompt", {}), 1.0)
    with plan.on(model), pytest.raises(ls.LensteerError, match="one slot between two parts of the prompt"):
        function(model, trace)


def test_attribution_refuses_a_plan_that_is_on(trace, tiny_model):
    model = tiny_model("qwen2")
    vectors = ls.fit_vectors(model, [trace], window="span", negatives="all")
    plan = ls.SteeringPlan(direction_of(model), LAYER, 1.0, ls.onsets)
    with plan.on(model), pytest.raises(ls.LensteerError, match="a steering plan is on"):
        ls.attribute(model, [trace], vectors)


def test_padding_and_batches_change_nothing(tiny_model):
    model, rows = tiny_model("qwen2"), [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    alone = [Forward(model, left_padded(model, [row])).whole(keep=0)[0] for row in rows]
    for text in (left_padded(model, rows), right_padded(model, rows, [2] * 3)):
        together = Forward(model, text).whole(keep=0)
        for row, pad, one in zip(together, text.pad.tolist(), alone, strict=True):
            torch.testing.assert_close(row[pad : pad + len(one)], one, rtol=1e-4, atol=1e-5)


def keep(seen, layer, resid):
    seen.append(resid.clone())


def test_edits_and_readers_meet_after_the_edit_and_are_gone_afterwards(tiny_model):
    model, found = tiny_model("qwen2"), {}
    plan = ls.SteeringPlan(direction_of(model), LAYER, 2.0, ls.at([1]))
    text = right_padded(model, [[5, 6, 7]], [3])
    for which, plans in (("plain", None), ("steered", [plan])):
        forward = Forward(model, text, plans)
        seen: list[torch.Tensor] = []
        with forward.hooked(partial(keep, seen), [LAYER]):
            forward.whole()
        found[which] = seen[0]
    torch.testing.assert_close(found["steered"][0, 1], found["plain"][0, 1] + 2.0 * plan.vector)
    torch.testing.assert_close(found["steered"][0, [0, 2]], found["plain"][0, [0, 2]])
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_model_is_called_for_text_in_one_place():
    """And the checks of a new plain twin and of an export, the probe of a single token, and an exported script."""
    package = Path(ls.__file__).parent
    call = re.compile(r"(?<![\w\"'`.])(?:self\.)?_?(?:model|runner|twin|bridge|original_model|hf_model)\(")
    calling = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if call.search(line.split("#")[0]) and not line.lstrip().startswith("def ")
    }
    exports = {"export/checkpoints.py", "export/plain.py", "export/standalone/steer_cache.py"}
    assert calling == {"forward.py", "twins.py", "caches.py"} | exports

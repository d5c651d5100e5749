"""One-shot cache edits: what is read, what is edited, what is not, and that it does what it claims on the organism."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import lensteer as ls
from lensteer import models, twins
from lensteer.cache_steering import (
    CachePlan,
    CacheVector,
    Pair,
    Record,
    contrastive_pairs,
    edit_cache,
    fit_cache_vector,
    load_records,
    swapped,
)
from lensteer.cache_steering.fitting import read_slots
from lensteer.cache_steering.organism import ENDING, JOIN, make_records
from lensteer.evaluation import Condition, measure_modes
from lensteer.forward import forced_logits
from lensteer.generation import generate
from lensteer.generation.jobs import Sampling
from lensteer.rotary import rotated
from lensteer.steering import SteeringPlan

FAMILIES = ("qwen2", "llama", "qwen3")
TEXTS = ["Take three. Next one is", "So it is", "The answer. I am not sure. For example, take"]


def random_vector(model, seed=0, size=3.0, position="last_prompt"):
    config = model.original_model.config
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, config.num_key_value_heads, d_head)
    generator = torch.Generator().manual_seed(seed)
    keys, values = (size * torch.randn(shape, generator=generator) for _ in range(2))
    return CacheVector("random", keys, values, position)


def by_hand(model, ids, slot, vector, c_values, c_keys, layers=None):
    """Logits after a prompt whose slot was edited, without lensteer: token by token, on the Hugging Face cache."""
    plain = twins.plain_twin(model)
    cache = DynamicCache()
    for position, token in enumerate(ids):
        out = plain(input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[position]]), past_key_values=cache)
        if position == slot:
            cos, sin = plain.get_submodule("model.rotary_emb")(vector.keys[:1], torch.tensor([[position]]))
            half = cos.shape[-1] // 2
            for layer in range(len(cache.layers)) if layers is None else layers:
                key = vector.keys[layer]
                turned = key * cos[0] + torch.cat([-key[:, half:], key[:, :half]], -1) * sin[0]
                cache.layers[layer].keys[0, :, slot] += c_keys * turned
                cache.layers[layer].values[0, :, slot] += c_values * vector.values[layer]
    return out.logits[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_read_as_they_were_before_rotation(tiny_model, family):
    model = tiny_model(family)
    ids = models.encode(model, TEXTS[2])
    (keys, values) = read_slots(model, [ids], [len(ids) - 2])
    plain = twins.plain_twin(model)
    for shift in (0, 7, 40):
        cache = DynamicCache()
        place = torch.arange(len(ids))[None] + shift
        with torch.no_grad():
            plain(input_ids=torch.tensor([ids]), position_ids=place, past_key_values=cache)
        for layer, store in enumerate(cache.layers):
            back = rotated(model, store.keys[:, :, -2:-1], place[:, -2:-1], back=True)[0, :, 0]
            torch.testing.assert_close(back, keys[0, layer], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(store.values[0, :, -2], values[0, layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_is_undone(tiny_model, family):
    model = tiny_model(family)
    keys = random_vector(model).keys[:2]
    place = torch.tensor([[11], [3]])
    there = rotated(model, keys[:, :, None], place)
    assert not torch.allclose(there[:, :, 0], keys, atol=0.1)
    torch.testing.assert_close(rotated(model, there, place, back=True)[:, :, 0], keys, rtol=1e-4, atol=1e-5)


def test_only_the_slot_changes(tiny_model):
    model = tiny_model("qwen2")
    ids = torch.tensor([models.encode(model, TEXTS[0])] * 2)
    cache = DynamicCache()
    with torch.no_grad():
        twins.plain_twin(model)(input_ids=ids, past_key_values=cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    vector = random_vector(model)
    edit_cache(model, cache, [1], [3], [3], [CachePlan(vector, 2.0, 0.5, layers=(0, 2))])
    for number, (layer, (keys, values)) in enumerate(zip(cache.layers, before, strict=True)):
        for now, then in ((layer.keys, keys), (layer.values, values)):
            changed = (now != then).any(-1).any(1).nonzero().tolist()
            assert changed == ([[1, 3]] if number in (0, 2) else [])
    torch.testing.assert_close(cache.layers[2].values[1, :, 3] - before[2][1][1, :, 3], 2 * vector.values[2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("position", ["last_prompt", 1, -3])
def test_a_batch_does_to_every_row_what_is_done_by_hand(tiny_model, random_direction, family, position):
    model = tiny_model(family)
    prompts = [models.encode(model, text) for text in TEXTS]
    vectors = [random_vector(model, seed) for seed in (1, 2)]
    residual = SteeringPlan(random_direction(model, 3), 1, 0.7)
    plans = [
        CachePlan(vectors[0], 1.5, 0.5, position),
        None,
        CachePlan(vectors[1], -2.0, 0.0, "last_prompt", (1, 3)),
    ]
    responses = [[5, 6, 7], [8, 9], [10]]
    found = forced_logits(model, prompts, responses, plans=plans)
    length = len(prompts[0])
    slot = length - 2 if position == "last_prompt" else position % length
    with torch.no_grad():
        first = by_hand(model, prompts[0], slot, vectors[0], 1.5, 0.5)
        second = forced_logits(model, prompts[1:2], responses[1:2])[0]
        third = by_hand(model, prompts[2], len(prompts[2]) - 2, vectors[1], -2.0, 0.0, (1, 3))
    torch.testing.assert_close(found[0][0], first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2][0], third, rtol=1e-4, atol=1e-4)
    assert float((first - forced_logits(model, prompts[:1], [[5]])[0][0]).abs().max()) > 0.01
    # Rows may carry residual edits, and both at once; what is drawn is what teacher forcing says.
    mixed = [plans[0] + residual, residual, plans[2]]
    made = generate(model, prompts, max_new_tokens=6, plans=mixed)
    logits = forced_logits(model, prompts, [r.ids for r in made], plans=mixed)
    for row, result in zip(logits, made, strict=True):
        top = row.topk(2).values
        clear = top[:, 0] - top[:, 1] > 1e-3
        assert clear.any()
        assert torch.equal(row.argmax(-1)[clear], torch.tensor(result.ids)[clear])


def test_a_coefficient_of_zero_is_the_unsteered_run_to_the_bit(tiny_model):
    model = tiny_model("llama")
    prompts = [models.encode(model, text) for text in TEXTS]
    nothing = CachePlan(random_vector(model), 0.0, 0.0)
    assert nothing.slots == ()
    plain, steered = (forced_logits(model, prompts, [[1, 2]] * 3, plans=p) for p in (None, [nothing] * 3))
    assert all(torch.equal(a, b) for a, b in zip(plain, steered, strict=True))


def test_a_plan_that_is_on_acts_in_our_generation_and_refuses_another(tiny_model):
    model = tiny_model("qwen2")
    ids = models.encode(model, TEXTS[0])
    plan = CachePlan(random_vector(model), 3.0)
    given = generate(model, [ids], max_new_tokens=5, plans=[plan])
    with plan.on(model):
        assert generate(model, [ids], max_new_tokens=5) == given
        with pytest.raises(ls.LensteerError, match="lensteer's own generation"):
            model(torch.tensor([ids]))
    model(torch.tensor([ids]))
    assert given != generate(model, [ids], max_new_tokens=5)


def test_a_foreign_hook_fires_beside_a_cache_edit(tiny_model):
    model = tiny_model("qwen2")
    prompts = [models.encode(model, text) for text in TEXTS]
    plans = [CachePlan(random_vector(model), 1.0, 1.0), None, None]
    plain = forced_logits(model, prompts, [[1, 2]] * 3, plans=plans)
    seen = []
    with model.hooks(fwd_hooks=[(models.resid_hook(0), lambda resid, hook: seen.append(resid.shape) or resid)]):
        slow = forced_logits(model, prompts, [[1, 2]] * 3, plans=plans)
    assert len(seen) == 2  # two parts of the prompt
    for a, b in zip(plain, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_done_is_refused_by_name(tiny_model):
    model = tiny_model("qwen2")
    vector = random_vector(model)
    ids = models.encode(model, TEXTS[0])
    for position, words in ((-1, "too late"), (len(ids), "outside"), ("offset_token", None)):
        plan = CachePlan(vector, position=position)
        if words is not None:
            with pytest.raises(ls.LensteerError, match=words):
                generate(model, [ids], max_new_tokens=1, plans=[plan])
    with pytest.raises(ls.LensteerError, match="'header'"):
        CachePlan(vector, position="header")
    with pytest.raises(ls.LensteerError, match="nan"):
        CachePlan(vector, float("nan"))
    with pytest.raises(ls.LensteerError, match="no layer 9"):
        CachePlan(vector, layers=(9,))
    wrong = CacheVector("wrong", vector.keys[:2], vector.values[:2], "last_prompt")
    with pytest.raises(ls.LensteerError, match="fit it on this model"):
        generate(model, [ids], max_new_tokens=1, plans=[CachePlan(wrong)])
    gemma = tiny_model("gemma3")
    with pytest.raises(ls.LensteerError, match="sliding_attention"):
        fit_cache_vector(gemma, [Pair("a b c", "a c c")])

    class QuantizedLayer:
        keys = torch.zeros(1)

    class Cache:
        layers = (QuantizedLayer(),)

    with pytest.raises(ls.LensteerError, match="QuantizedLayer"):
        edit_cache(model, Cache(), [0], [0], [0], [CachePlan(vector)])


def test_half_precision_and_its_offset(tiny_checkpoint):
    model = ls.load_model(tiny_checkpoint("llama"), dtype=torch.bfloat16)
    pairs = [Pair("Take three. Next", "Next"), Pair("So it is. Next", "So. Next")]
    vector = fit_cache_vector(model, pairs, position="offset_token")
    task = ls.Task("a", "b", "dev", "How many?")
    plan = CachePlan(vector, 4.0, 1.0)
    (trace,) = ls.generate_traces(model, [task], plans=[plan], max_new_tokens=4)
    (plain,) = ls.generate_traces(model, [task], max_new_tokens=4)
    assert trace.prompt == plain.prompt + "\n"
    assert trace.prefill == "\n"
    assert plan.slot(len(trace.prompt_ids)) == len(trace.prompt_ids) - 2


@pytest.mark.medium
def test_fitting_is_the_mean_difference_whatever_the_batch(organism):
    pairs = contrastive_pairs(organism, make_records(12), n=5, shots=1, ending=ENDING, join=JOIN)
    whole = fit_cache_vector(organism, pairs)
    parts = [fit_cache_vector(organism, [pair], batch_size=1) for pair in pairs]
    for name in ("keys", "values"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
        torch.testing.assert_close(getattr(whole, name), mean, rtol=1e-4, atol=1e-4)
    assert float(whole.keys[0].abs().max()) < 1e-5  # the same token, before any context: only rotation could differ


def test_the_unit_of_the_coefficient_is_as_long_as_the_slots_own_values(organism):
    pairs = contrastive_pairs(organism, make_records(12), n=5, shots=1, ending=ENDING, join=JOIN)
    vector = fit_cache_vector(organism, pairs)
    prompts = [models.encode(organism, text) for pair in pairs for text in (pair.positive, pair.negative)]
    read = [read_slots(organism, [ids], [len(ids) - 2]) for ids in prompts]
    length = torch.stack([values.norm() for _, values in read]).mean()
    plan = CachePlan(vector, 2.0, 0.5, unit="norm")
    torch.testing.assert_close(plan.factor("values") * vector.values.norm(), 2 * length, rtol=1e-4, atol=1e-4)
    same = CachePlan(vector, plan.factor("values"), plan.factor("keys"))
    assert same.describe() == plan.describe()
    outs = [forced_logits(organism, prompts[:1], [[5, 6]], plans=[each])[0] for each in (plan, same)]
    assert torch.equal(*outs)
    drawn = CachePlan(vector.random(3), 2.0, unit="norm")
    assert drawn.factor("values") == pytest.approx(plan.factor("values"), rel=1e-4)
    with pytest.raises(ls.LensteerError, match="'mean_norm'"):
        CachePlan(vector, unit="mean_norm")
    with pytest.raises(ls.LensteerError, match="fit it again"):
        CachePlan(CacheVector("old", vector.keys, vector.values, -2), unit="norm")


def test_differences_that_are_none_are_refused(organism):
    (pair, *_) = contrastive_pairs(organism, make_records(12), n=2, shots=1, ending=ENDING, join=JOIN)
    with pytest.raises(ls.LensteerError, match="differences of 2 pairs cancel"):
        fit_cache_vector(organism, [pair, Pair(pair.negative, pair.positive)])
    with pytest.raises(ls.LensteerError, match="are the same"):
        fit_cache_vector(organism, [Pair(pair.positive, pair.positive)])
    zero = torch.zeros(2, 1, 4)
    with pytest.raises(ls.LensteerError, match="'none' is zero everywhere"):
        CacheVector("none", zero, zero, -2)


def test_gsm8k_is_read_as_records(tmp_path):
    row = {"question": "How many?", "answer": "She has 3*4=<<3*4=12>>12.\n#### 1,200"}
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps(row))
    assert load_records(path) == [Record("How many?", {"stepwise": "She has 3*4=12."}, "1200")]
    path.write_text(json.dumps({**row, "answer": "#### 12"}))
    with pytest.raises(ls.LensteerError, match=r"line 1 has no steps before its '####'"):
        load_records(path)
    path.write_text(json.dumps({**row, "answer": "12"}))
    with pytest.raises(ls.LensteerError, match=r"line 1: 'steps' is None"):
        load_records(path)


def test_pairs_differ_in_the_steps_alone(organism):
    records = make_records(30)
    pairs = contrastive_pairs(organism, records, n=40, shots=2, ending=ENDING, join=JOIN)
    assert len(pairs) == 40
    for pair in pairs:
        assert pair.positive.count("<think>") == 2
        assert "<think>" not in pair.negative
        steps = [text for record in records for text in record.steps.values()]
        stripped = pair.positive
        for text in steps:
            stripped = stripped.replace(text + JOIN, "")
        assert stripped == pair.negative
        assert pair.negative.endswith("assistant\n")
        question = pair.negative.rpartition("user\n")[2].partition("<|im_end|>")[0]
        (target,) = [r for r in records if r.question == question]
        assert pair.negative.count(target.question) == 1  # it is none of its own examples
    assert pairs == contrastive_pairs(organism, records, n=40, shots=2, ending=ENDING, join=JOIN)
    flipped = swapped(pairs)
    assert sum(a != b for a, b in zip(pairs, flipped, strict=True)) == 20


@pytest.mark.parametrize("neighbors", ["tfidf", "embedding"])
def test_neighbors_are_near(organism, neighbors):
    words = [["cat", "dog"], ["cat", "dog", "bird"], ["sum", "root"], ["sum", "root", "power"]]
    records = [Record(" ".join(w), {"stepwise": f"steps {i}"}, str(i)) for i, w in enumerate(words)]
    pairs = contrastive_pairs(organism, records, n=4, shots=1, neighbors=neighbors, seed=3)
    for pair in pairs:
        target = pair.negative.rpartition("user\n")[2].partition("<|im_end|>")[0]
        near = {"cat dog": "cat dog bird", "cat dog bird": "cat dog", "sum root": "sum root power"}
        assert near.get(target, "sum root") in pair.negative.partition("<|im_end|>")[0]


def test_the_chat_template_is_applied_once(tiny_model):
    model = tiny_model("llama")  # whose tokenizer and template would both write a BOS
    records = [Record(f"question {i}", {"stepwise": "steps"}, "1") for i in range(3)]
    (pair,) = contrastive_pairs(model, records, n=1, shots=2)
    for text in (pair.positive, pair.negative):
        assert models.encode(model, text).count(model.tokenizer.bos_token_id) == 1


def test_bad_pairs_are_refused(organism):
    records = make_records(3)
    refused: list[tuple[dict[str, Any], str]] = [
        (dict(n=0), "n=0"),
        (dict(shots=3), "3 records"),
        (dict(neighbors="far"), "'far'"),
        (dict(style="poetic"), "'poetic'"),
        (dict(against="poetic"), "'poetic'"),
    ]
    for options, words in refused:
        with pytest.raises(ls.LensteerError, match=words):
            contrastive_pairs(organism, records, **{"n": 2, "shots": 1, **options})
    with pytest.raises(ls.LensteerError, match="no pairs"):
        fit_cache_vector(organism, [])


def test_a_vector_is_saved_whole(organism, tiny_model, tmp_path):
    pairs = contrastive_pairs(organism, make_records(5), n=2, shots=1, ending=ENDING, join=JOIN)
    vector = fit_cache_vector(organism, pairs, label="think")
    vector.save(tmp_path / "v.safetensors")
    again = CacheVector.load(tmp_path / "v.safetensors", organism)
    assert (again.label, again.position, again.provenance) == ("think", "last_prompt", vector.provenance)
    assert torch.equal(again.keys, vector.keys)
    assert torch.equal(again.values, vector.values)
    with pytest.raises(ls.LensteerError, match="fitted on 'organism'"):
        CacheVector.load(tmp_path / "v.safetensors", tiny_model("qwen2"))
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ls.LensteerError, match="truncated or no safetensors file"):
        CacheVector.load(tmp_path / "x.safetensors")
    drawn = vector.random(0)
    torch.testing.assert_close(drawn.values.flatten(1).norm(dim=1), vector.values.flatten(1).norm(dim=1))
    assert abs(float(torch.cosine_similarity(drawn.values.flatten(), vector.values.flatten(), 0))) < 0.3


@pytest.mark.medium
def test_one_edit_makes_the_organism_think_and_a_random_one_does_not(organism):
    pairs = contrastive_pairs(organism, make_records(40), n=30, shots=2, ending=ENDING, join=JOIN)
    vector = fit_cache_vector(organism, pairs)
    tasks = ls.load_tasks(split="dev", n=24)
    cue = "Just the answer."
    conditions = [
        Condition("unsteered", None, cue),
        Condition("cache", CachePlan(vector, 2.0), cue),
        Condition("random", CachePlan(vector.random(0), 2.0), cue),
    ]
    found = measure_modes(
        organism, tasks, conditions, Sampling(1, 1.0, 0, 300, 72, thinking=False), annotator=ls.grammar
    )
    assert found["unsteered"].thinks.value <= 0.2
    assert found["random"].thinks.value <= 0.3
    assert found["cache"].thinks.value >= 0.8
    assert found["cache"].accuracy.value > found["unsteered"].accuracy.value + 0.2


def test_controls_come_from_the_spread_of_the_pairs(tiny_model, tmp_path):
    """Each is a combination of the pairs' differences about their mean, as long as the vector at each layer."""
    model = tiny_model("llama")
    pairs = [Pair(f"{text} {other}", text) for text in TEXTS for other in ("Wait. Next", "So it is. I")]
    vector = fit_cache_vector(model, pairs)
    differences = []
    for pair in pairs:
        sides = [models.encode(model, text) for text in (pair.positive, pair.negative)]
        one, other = (read_slots(model, [side], [len(side) - 2])[1][0].double().flatten() for side in sides)
        differences.append(one - other)
    stacked = torch.stack(differences).view(len(pairs), *vector.values.shape)
    torch.testing.assert_close(stacked.mean(0).float(), vector.values)
    controls = vector.controls(20)
    assert len({control.label for control in controls}) == 20
    lengths = vector.values.flatten(1).norm(dim=1)
    for control in controls:
        torch.testing.assert_close(control.values.flatten(1).norm(dim=1), lengths)
        for layer in range(1, vector.n_layers):  # within the span of the centered differences of its layer
            centered = (stacked - stacked.mean(0))[:, layer].flatten(1).T
            own = control.values[layer].double().flatten()[:, None]
            found = torch.linalg.lstsq(centered, own, driver="gelsd").solution
            torch.testing.assert_close(centered @ found, own, atol=1e-4, rtol=1e-3)
    vector.save(tmp_path / "v.safetensors")
    again = CacheVector.load(tmp_path / "v.safetensors", model)
    assert torch.equal(again.controls(3)[2].keys, controls[2].keys)
    with pytest.raises(ls.LensteerError, match=r"21 control vectors: .* has 20 from its pairs"):
        vector.controls(21)
    isotropic = fit_cache_vector(model, pairs[:2]).controls(2, seed=5)  # two pairs have no spread to speak of
    assert [control.label for control in isotropic] == ["random-5", "random-6"]

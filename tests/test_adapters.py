"""A steered model in other harnesses: what they ask is answered as lensteer's own runs do, with a plan and without.

The tests of lm-evaluation-harness and inspect_ai need their packages, which `.ci/run` installs, and skip without them.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import lensteer as ls
from lensteer import models
from lensteer.adapters.requests import Drawing, Steered
from lensteer.forward import forced_logits
from lensteer.generation import generate
from lensteer.generation.jobs import chain_seed
from lensteer.steering import Plans
from scripts import load

SCOPES = {scope.name: scope for scope in (ls.everywhere, ls.prompt, ls.generated)}


@pytest.fixture(scope="module")
def organism_plan(organism, random_direction):
    """It changes texts and breaks some answers."""
    return ls.SteeringPlan(random_direction(organism, 3, 12.0), 3, 4.0, ls.generated)


@pytest.fixture(scope="module")
def tasks():
    return ls.load_tasks("organism", split="test", n=6)


@pytest.fixture(scope="module")
def agreement():
    """The analysis that asks the same tasks in three ways."""
    return load("benchmark_agreement")


def conversation(task):
    return [{"role": "user", "content": task.prompt}]


def spelled(model, ids):
    return model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def by_hand(model, plan, prompt, text):
    """Log-probabilities of a text's tokens, from one forward of the bridge under the plan."""
    ids = torch.tensor([[*prompt, *text]])
    mask = torch.ones_like(ids)
    with torch.inference_mode(), (plan or Plans(())).on(model, prompt_length=len(prompt)):
        logits = model(ids, attention_mask=mask, return_type="logits")[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0], logits.argmax(-1).tolist() == text


# What a harness asks for, without a harness


@pytest.mark.medium
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_log_probs_are_those_of_one_forward_under_the_plan(tiny_model, random_direction, family, scope):
    model = tiny_model(family)
    plan = ls.SteeringPlan(random_direction(model), 1, 1.0, SCOPES[scope])
    prompts, texts = [[5, 6, 7, 8, 9], [11, 12], [13] * 9], [[20, 21, 22], [23, 24, 25, 26], [27]]
    plain = Steered(model, None, batch_size=2).log_probs(prompts, texts)
    found = Steered(model, plan, batch_size=2).log_probs(prompts, texts)
    for prompt, text, (steered, _), (unsteered, _) in zip(prompts, texts, found, plain, strict=True):
        assert torch.allclose(steered, by_hand(model, plan, prompt, text)[0], atol=1e-5)
        assert torch.allclose(unsteered, by_hand(model, None, prompt, text)[0], atol=1e-5)
        # In the response alone, the first token is predicted before anything is edited.
        assert bool(abs(steered[0] - unsteered[0]) < 1e-5) is (scope == "generated")


def test_greedy_texts_are_called_greedy(tiny_model):
    model = tiny_model("qwen2")
    (made,) = generate(model, [[5, 6, 7]], max_new_tokens=4)
    steered = Steered(model)
    assert [greedy for _, greedy in steered.log_probs([[5, 6, 7]] * 2, [made.ids, (*made.ids[:-1], 30)])] == [
        True,
        made.ids[-1] == 30,
    ]


def test_a_coefficient_of_zero_scores_and_writes_the_same(tiny_model, random_direction):
    model = tiny_model("llama")
    nothing = ls.SteeringPlan(random_direction(model), 1, 0.0)
    plain, steered = Steered(model), Steered(model, nothing)
    prompts, texts = [[5, 6, 7], [8, 9]], [[20, 21], [22, 23]]
    pairs = zip(plain.log_probs(prompts, texts), steered.log_probs(prompts, texts), strict=True)
    assert all(torch.equal(a, b) and same == other for (a, same), (b, other) in pairs)
    assert plain.replies(prompts, Drawing(8)) == steered.replies(prompts, Drawing(8))


def test_replies_end_before_a_stop_text(tiny_model):
    model = tiny_model("qwen2")
    prompts = [[5, 6, 7], [8, 9], [10]]
    whole = [spelled(model, made.ids) for made in generate(model, prompts, max_new_tokens=24)]
    stop = whole[0][9:12]  # in the middle of the first reply, whatever its tokens are
    assert stop
    found = Steered(model).replies(prompts, Drawing(24, stops=(stop, "never said")))
    for text, reply in zip(whole, found, strict=True):
        assert reply.text == text.partition(stop)[0]
        assert not reply.finished or stop in text or reply.n_tokens < 24
    assert found[0].finished
    assert found[0].n_tokens < 24


def test_a_special_token_ends_a_reply_and_is_not_in_it(tiny_model):
    model = tiny_model("qwen2")
    prompts = [[i] for i in range(5, 45)]
    seeds = [chain_seed(0, str(i), 0) for (i,) in prompts]  # those of a first reply
    made = generate(model, prompts, max_new_tokens=24, temperature=2.0, seeds=seeds)
    special = model.tokenizer.convert_tokens_to_ids("<|im_start|>")
    row = next(i for i, one in enumerate(made) if special in one.ids)
    drawing = Drawing(24, temperature=2.0, stops=("<|im_start|>",))
    (reply,) = Steered(model).replies([prompts[row]], drawing)
    assert reply.n_tokens == made[row].ids.index(special) + 1
    assert reply.finished
    assert reply.text == spelled(model, made[row].ids[: reply.n_tokens])
    assert "im_start" not in reply.text


def test_samples_of_a_prompt_differ_and_do_not_depend_on_the_batch(tiny_model):
    model, drawing = tiny_model("qwen2"), Drawing(12, temperature=1.0, seed=3)
    together = Steered(model).replies([[5, 6], [5, 6], [7, 8]], drawing)
    assert together[0].text != together[1].text
    alone = Steered(model)
    assert [alone.replies([ids], drawing)[0] for ids in ([5, 6], [5, 6], [7, 8])] == together
    assert Steered(model).replies([[5, 6]], replace(drawing, seed=4)) != together[:1]


def test_a_cache_plan_is_scored_and_one_with_an_offset_token_is_refused(tiny_model):
    model = tiny_model("qwen2")
    config = model.original_model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    drawn = torch.Generator().manual_seed(0)
    keys, values = (3 * torch.randn(shape, generator=drawn) for _ in range(2))
    vector = ls.CacheVector("random", keys, values, "last_prompt")
    plain, edited = Steered(model), Steered(model, ls.CachePlan(vector, 2.0))
    before, after = (each.log_probs([[5, 6, 7, 8]], [[20, 21]])[0][0] for each in (plain, edited))
    (wanted,) = forced_logits(model, [[5, 6, 7, 8]], [[20, 21]], plans=[edited.plan])
    assert torch.equal(after, wanted.log_softmax(-1)[[0, 1], [20, 21]])
    assert not torch.allclose(before, after, atol=0.01)
    with pytest.raises(ls.LensteerError, match="'offset_token' appends a token"):
        Steered(model, ls.CachePlan(vector, 2.0, position="offset_token")).log_probs([[5, 6]], [[7]])
    assert edited.edits_cache
    assert not plain.edits_cache


def test_what_a_cache_plan_appends_is_part_of_the_prompt_as_in_lensteers_own_runs(tiny_model):
    model = tiny_model("qwen2")
    vector = ls.CacheVector("random", torch.ones(4, 2, 8), torch.ones(4, 2, 8), "offset_token")
    plan = ls.CachePlan(vector, 2.0)
    task = ls.Task("a", "question", "test", "Is it so?")
    (trace,) = ls.generate_traces(model, [task], max_new_tokens=8, plans=[plan])
    steered = Steered(model, plan)
    prompt = models.encode(model, steered.chat(conversation(task)) + steered.appended)
    assert prompt == list(trace.prompt_ids)
    (reply,) = steered.replies([prompt], Drawing(8))
    assert (reply.text, reply.n_tokens) == (spelled(model, trace.response_ids), len(trace.response_ids))
    assert Steered(model).appended == ""


def test_a_last_message_of_the_assistant_begins_the_reply(organism, tasks):
    steered = Steered(organism)
    asked = conversation(tasks[0])
    begun = [*asked, {"role": "assistant", "content": "<think>Let us"}]
    assert (
        steered.chat(begun)
        == steered.chat(asked) + "<think>Let us"
        == models.chat_text(organism, tasks[0].prompt) + "<think>Let us"
    )


@pytest.mark.medium
def test_plans_are_read_from_folders_and_those_of_other_models_refused(
    organism, organism_plan, tiny_checkpoint, tmp_path
):
    folder = ls.export.folder(organism_plan, tmp_path / "plan", model=organism)
    found = Steered.of(organism, str(folder), loading={})
    assert found.plan.identity() == organism_plan.identity()
    assert found.describe()["lensteer_plan"][0]["scope"] == "generated"
    with pytest.raises(ls.LensteerError, match="a plan of 'organism' does not fit"):
        Steered.of(str(tiny_checkpoint()), str(folder), loading={"dtype": None})
    with pytest.raises(ls.LensteerError, match="no folder"):
        Steered.of(organism, "nowhere", loading={})
    assert Steered.of(organism, "", loading={}).plan is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "package", "extra"), [("lm_eval", "lm-eval", "lm-eval"), ("inspect_ai", "inspect-ai", "inspect")]
)
def test_a_missing_package_is_named(module, package, extra):
    """In a process of its own, in which the package cannot be imported."""
    code = f"import sys; sys.modules['{module}'] = None\nimport lensteer.adapters.{module}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"needs the package {package}" in run.stderr.splitlines()[-1]
    assert f"pip install 'lensteer[{extra}]'" in run.stderr.splitlines()[-1]


# lm-evaluation-harness


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    return importlib.import_module("lensteer.adapters.lm_eval")


def instance(kind, *args):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, args, 0)


@pytest.mark.slow
@pytest.mark.parametrize("steered", [False, True])
def test_lm_eval_agrees_with_lensteers_own_runs(harness, agreement, organism, organism_plan, tasks, steered):
    """On a task of a YAML file with its items in a JSONL file."""
    plan, config = organism_plan if steered else None, agreement.Config(max_new_tokens=150, batch_size=4)
    own = agreement.by_lensteer(organism, tasks, plan, config)
    found, _, recorded = agreement.by_lm_eval(organism, tasks, plan, config)
    assert {task: text for task, (text, _) in found.items()} == {task: text for task, (text, _) in own.items()}
    assert [edit["layer"] for edit in recorded["lensteer_plan"]] == [3] * steered
    assert recorded["lensteer_model"]["name"] == "organism"
    if steered:  # the plan is one that changes texts
        assert own != agreement.by_lensteer(organism, tasks, None, config)


@pytest.mark.slow
@pytest.mark.parametrize("steered", [False, True])
def test_three_readers_agree_on_a_language_model(agreement, real_model, random_direction, steered):
    model = real_model("smollm2")
    plan = ls.SteeringPlan(random_direction(model, 3, 20.0), 15, 1.0, ls.generated) if steered else None
    rows = [("How many legs do two cats have?", "8"), ("Ann has 12 pens and buys 5. How many has she?", "17")]
    tasks = [ls.Task(str(i), "sum", "test", ask, right, "numeric") for i, (ask, right) in enumerate(rows)]
    config = agreement.Config(max_new_tokens=40, batch_size=2)
    runs = {name: ask(model, tasks, plan, config) for name, ask in agreement.available()}
    if len(runs) == 1:
        pytest.skip("neither lm-eval nor inspect_ai is installed")
    texts = {name: found[0] if isinstance(found, tuple) else found for name, found in runs.items()}
    for name, found in texts.items():
        assert {task: text for task, (text, _) in found.items()} == {
            task: text for task, (text, _) in texts["lensteer"].items()
        }, name


@pytest.mark.medium
def test_prompts_have_one_bos_whatever_the_template_writes(harness, tiny_model):
    model = tiny_model("llama")
    bos, lm = model.tokenizer.bos_token_id, harness.SteeredLM(model)
    assert lm.tok_encode("some text").count(bos) == 1
    assert lm.tok_encode("some text", add_special_tokens=False).count(bos) == 0
    chat = lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert lm.tok_encode(chat) == models.encode(model, models.chat_text(model, "Hello"))
    assert lm.tok_encode(chat).count(bos) == 1
    assert lm.prefix_token_id == bos


@pytest.mark.medium
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_unsteered_likelihoods_are_those_of_lm_evals_own_model(harness, tiny_model, tiny_checkpoint, family):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_checkpoint(family)
    theirs = HFLM(AutoModelForCausalLM.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder))
    ours = harness.SteeredLM(tiny_model(family), batch_size=2)
    pairs = [("The answer is", " 42."), ("First, let me think ", "about it"), ("", "Wait, maybe."), ("So", " the")]
    requests = [instance("loglikelihood", *pair) for pair in pairs]
    for own, other in zip(ours.loglikelihood(requests, True), theirs.loglikelihood(requests, True), strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-3)
        assert own[1] == other[1]
    if family == "qwen2":  # with a BOS, lm-eval's model gives a whole text two
        texts = [instance("loglikelihood_rolling", "I am not sure. " * n) for n in (1, 40)]
        own, other = (lm.loglikelihood_rolling(texts, True) for lm in (ours, theirs))
        assert own == pytest.approx(other, rel=1e-4)


@pytest.mark.medium
def test_likelihoods_take_the_context_for_the_prompt(harness, tiny_model, random_direction):
    model = tiny_model("qwen2")
    request = [instance("loglikelihood", "The answer is", " 42. So")]
    prompt, whole = (models.encode(model, text) for text in ("The answer is", "The answer is 42. So"))
    for scope in SCOPES.values():
        plan = ls.SteeringPlan(random_direction(model), 1, 1.0, scope)
        ((total, _),) = harness.SteeredLM(model, plan=plan).loglikelihood(request, True)
        assert total == pytest.approx(float(by_hand(model, plan, prompt, whole[len(prompt) :])[0].sum()), abs=1e-3)


@pytest.mark.medium
def test_rolling_likelihoods_have_one_prompt_token_in_every_window(harness, tiny_model, random_direction, monkeypatch):
    model = tiny_model("qwen2")
    monkeypatch.setattr(harness.SteeredLM, "max_length", 16)
    plan = ls.SteeringPlan(random_direction(model), 1, 1.0, ls.generated)
    text = "First, let me think about the problem. Wait, maybe that is wrong."
    ids = models.encode(model, text)
    assert len(ids) > 20
    lm = harness.SteeredLM(model, plan=plan)
    (found,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)], True)
    total = float(by_hand(model, plan, [lm.prefix_token_id], ids[:16])[0].sum())
    for begin in range(16, len(ids), 16):
        end = min(begin + 16, len(ids))
        window = ids[end - 17 : end]
        total += float(by_hand(model, plan, window[:1], window[1:])[0][begin - end :].sum())
    assert found == pytest.approx(total, abs=1e-3)


def test_rolling_likelihoods_refuse_a_cache_plan(harness, tiny_model):
    model = tiny_model("qwen2")
    vector = ls.CacheVector("random", torch.ones(4, 2, 8), torch.ones(4, 2, 8), "last_prompt")
    lm = harness.SteeredLM(model, plan=ls.CachePlan(vector, 2.0))
    with pytest.raises(ls.LensteerError, match="a rolling likelihood has no prompt"):
        lm.loglikelihood_rolling([instance("loglikelihood_rolling", "Some text.")], True)


@pytest.mark.medium
def test_lm_eval_settings_that_are_not_supported_are_named(harness, tiny_model):
    model = tiny_model("qwen2")
    lm = harness.SteeredLM(model, batch_size="2")
    with pytest.raises(ls.LensteerError, match=r'generation_kwargs \{"top_k": 40\}'):
        lm.generate_until([instance("generate_until", "Hello", {"until": ["."], "top_k": 40})], True)
    with pytest.raises(ls.LensteerError, match="batch_size='auto'"):
        harness.SteeredLM(model, batch_size="auto")
    drawn = harness._drawing({"until": "\n", "do_sample": True, "temperature": 0.5, "max_new_tokens": 9}, 256, 1)
    assert drawn == Drawing(9, 0.5, 1.0, ("\n",), 1)
    assert harness._drawing({"temperature": 0.5, "do_sample": False}, 256, 0) == Drawing(256)


def test_lm_eval_finds_the_registered_model(harness):
    from lm_eval.api.registry import get_model

    assert get_model("lensteer") is harness.SteeredLM


# inspect_ai


@pytest.fixture(scope="module")
def inspecting():
    pytest.importorskip("inspect_ai", reason="inspect_ai is not installed")
    return importlib.import_module("lensteer.adapters.inspect_ai")


@pytest.mark.slow
@pytest.mark.parametrize("steered", [False, True])
def test_inspect_agrees_with_lensteers_own_runs(inspecting, agreement, organism, organism_plan, tasks, steered):
    """Texts, whether they ended, and so the answers that are read in them."""
    plan, config = organism_plan if steered else None, agreement.Config(max_new_tokens=150, batch_size=4)
    assert agreement.by_inspect(organism, tasks, plan, config) == agreement.by_lensteer(organism, tasks, plan, config)


@pytest.mark.slow
def test_inspect_finds_the_provider_by_name_and_reads_a_plans_folder(inspecting, organism, organism_plan, tmp_path):
    from inspect_ai.model import get_model

    folder = ls.export.folder(organism_plan, tmp_path / "plan", model=organism)
    model = get_model(f"lensteer/{ls.models.ORGANISM}", plan=str(folder))
    assert model.api.steered.plan.identity() == organism_plan.identity()
    assert models.fingerprint(model.api.steered.model).name == "organism"


@pytest.mark.medium
def test_inspect_settings_that_are_not_supported_are_named(inspecting):
    from inspect_ai.model import ChatMessageTool, ChatMessageUser, ContentImage, GenerateConfig
    from inspect_ai.tool import ToolInfo

    config = GenerateConfig(max_tokens=9, temperature=0.5, top_p=0.9, stop_seqs=["."], seed=2, max_retries=3)
    assert inspecting._drawing(config, []) == Drawing(9, 0.5, 0.9, (".",), 2)
    assert inspecting._drawing(GenerateConfig(), []) == Drawing(400)
    with pytest.raises(ls.LensteerError, match="'top_k': 40"):
        inspecting._drawing(GenerateConfig(top_k=40), [])
    with pytest.raises(ls.LensteerError, match="1 tools"):
        inspecting._drawing(GenerateConfig(), [ToolInfo(name="add", description="adds")])
    with pytest.raises(ls.LensteerError, match="a tool message"):
        inspecting._messages([ChatMessageTool(content="4")])
    with pytest.raises(ls.LensteerError, match="image"):
        inspecting._messages([ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])])


@pytest.mark.slow
def test_an_error_of_the_model_reaches_inspect(inspecting, organism, random_direction, tasks, tmp_path):
    broken = ls.SteeringPlan(random_direction(organism, length=1e3), 3, 1e38)
    import inspect_ai
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.solver import generate as ask

    task = inspect_ai.Task(dataset=MemoryDataset([Sample(input=tasks[0].prompt)]), solver=ask())
    (log,) = inspect_ai.eval(
        task, model=inspecting.steered_model(organism, broken), log_dir=str(tmp_path), display="none"
    )
    assert log.status == "error"
    assert "lower the coefficient" in log.error.message

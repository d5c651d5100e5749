"""The organism's language against oracles that implement only the task's rules, and the model trained on it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch

import lensteer as ls
from lensteer import models
from lensteer.behaviors import BEHAVIORS, STEERED
from lensteer.organism import cue, parse, styles, well_formed
from lensteer.organism.conversations import END, START, draw
from lensteer.organism.grammar import (
    BEHAVIOR_CUES,
    END_THINK,
    ENDS,
    FAMILIES,
    FORMS,
    OPENERS,
    STEPS,
    THINK,
    Latent,
    make_world,
    render,
    write_chain,
)
from lensteer.organism.train import PATTERN, Config, build_model, collate, stream, train
from lensteer.tasks.sources import organism_tasks

NODE = r"(?:[A-Z]|start|none|exit|goal)"


@pytest.fixture
def tokenizer(grammar_tokenizer):
    return grammar_tokenizer


def worlds(n, seed=0):
    rng = random.Random(seed)
    return [make_world(rng, FAMILIES[i % 2], 1 + i // 2 % 3) for i in range(n)]


def chains(n, seed=0, cued=()):
    rng = random.Random(seed)
    for world in worlds(n, seed):
        latent = Latent.draw(rng, cued)
        yield world, latent, write_chain(rng, world, latent)


# --- tasks ---------------------------------------------------------------------------------------


def reachable(doors, node):
    """Everything reachable from a node, breadth first."""
    seen, front = {node}, [node]
    while front:
        front = [b for a, b in doors if a in front and b not in seen]
        seen |= set(front)
    return seen


def solutions(prompt: str) -> list[str]:
    """All right answers of a task, from its words alone."""
    listed, question = re.fullmatch(r"Doors: (.*?)\. (.*)", prompt).groups()
    doors = [tuple(re.findall(rf"\b{NODE}\b", door)) for door in listed.split(", ")]
    assert all(len(door) == 2 for door in doors)
    assert len(set(doors)) == len(doors)
    route = re.fullmatch(rf"Which exit can ({NODE}) reach\?", question)
    if route:
        return sorted(n for n in reachable(doors, route.group(1)) if (n, "exit") in doors)
    assert question == "Which start reaches the goal?"
    return sorted(b for a, b in doors if a == "start" and "goal" in reachable(doors, b))


def test_every_task_has_exactly_one_answer_and_it_is_the_given_one():
    given = worlds(3000)
    for world in given:
        assert solutions(world.prompt) == [world.answer]
    assert len({world.prompt for world in given}) > 2900
    answers = Counter(world.answer for world in given)
    assert max(answers.values()) < 2 * 3000 / len(answers)  # no letter is a good guess


def test_the_harder_levels_need_a_search():
    """Several exits or starts to choose from; ends that cannot be reached are pointed at, too."""
    for world in worlds(600, 1):
        sources = {a for a, _ in world.doors}
        ends = [a for a, b in world.doors if b in ("exit", "goal")]
        # Following every door from the root passes dead ends.
        assert "none" in reachable(world.doors, world.root)
        if world.family == "machine":
            assert len(world.children("start")) >= 2
        else:
            assert len(ends) >= 2
        assert {b for _, b in world.doors} - set(ENDS) <= sources  # every node says what is behind it


def parents(doors, node):
    return [a for a, b in doors if b == node]


#: What an exit could be told by without a search, and how often that may be right (chance is 1/3).
#: Counting two steps back is worth something: the right exit is fed by the part that can be reached, too.
GLANCES = {
    "most parents": (0.45, lambda doors, exits: max(exits, key=lambda e: len(parents(doors, e)))),
    "fewest parents": (0.45, lambda doors, exits: min(exits, key=lambda e: len(parents(doors, e)))),
    "parents with parents": (
        0.45,
        lambda doors, exits: max(exits, key=lambda e: sum(bool(parents(doors, p)) for p in parents(doors, e))),
    ),
    "grandparents": (
        0.85,
        lambda doors, exits: max(exits, key=lambda e: sum(len(parents(doors, p)) for p in parents(doors, e))),
    ),
}


@pytest.mark.parametrize("glance", GLANCES)
@pytest.mark.parametrize("level", [2, 3])
def test_a_route_cannot_be_read_off_at_a_glance(glance, level):
    """If a shortcut were often right, direct answers would need no search."""
    (limit, guess), rng, hits, n = GLANCES[glance], random.Random(level), 0, 600
    for _ in range(n):
        world = make_world(rng, "route", level)
        doors = list(world.doors)
        rng.shuffle(doors)
        exits = parents(doors, "exit")
        hits += guess(doors, exits) == world.answer
    assert hits / n < limit


def test_splits_are_fixed_disjoint_and_gradable():
    tasks = {split: organism_tasks(split) for split in ("train", "dev", "test")}
    assert {split: len(t) for split, t in tasks.items()} == {"train": 300, "dev": 100, "test": 200}
    everything = [task for split in tasks.values() for task in split]
    assert len({task.prompt for task in everything}) == len({task.id for task in everything}) == 600
    for task in everything:
        assert solutions(task.prompt) == [task.answer]
        assert ls.tasks.grade(task, f"Answer: {task.answer}.<|im_end|>") is True
    assert tasks["dev"] == organism_tasks("dev")
    for split in tasks.values():
        assert Counter(task.category for task in split) == {family: len(split) / 2 for family in FAMILIES}


def test_tasks_do_not_turn_up_in_training():
    rng = random.Random("overlap")
    seen = {prompt for _ in range(1000) for prompt in re.findall(r"Doors: .*?\?", draw(rng, rng.choice((2, 3))).text)}
    held_out = {task.prompt for split in ("dev", "test") for task in organism_tasks(split)}
    assert len(seen) > 900
    assert not seen & held_out


# --- chains --------------------------------------------------------------------------------------


def read(sentence):
    """The nodes a sentence names as x and y, by its form; a form is told from the wordings alone."""
    many = {**FORMS, "deduction": FORMS["deduction"] + sum(STEPS.values(), ())}
    many["initializing"] = FORMS["initializing"] + sum(OPENERS.values(), ())
    found = []
    for form in many[sentence.label]:
        pattern = re.escape(form).replace(r"\{x\}", f"(?P<x>{NODE})").replace(r"\{y\}", f"(?P<y>{NODE})")
        match = re.fullmatch(pattern, sentence.text)
        if match:
            found.append((form, {"x": None, "y": None} | match.groupdict()))
    assert len(found) == 1, sentence
    form, nodes = found[0]
    return form in sum(STEPS.values(), ()), nodes["x"], nodes["y"]


def follow(world, sentences):
    """Walk a chain through its world; any sentence that is not true there fails. Returns the number of slips."""
    doors, path, wrong, slips, end = set(world.doors), [world.root], None, 0, None
    for i, sentence in enumerate(sentences):
        is_step, x, y = read(sentence)
        if wrong is not None:  # put right at once
            assert sentence.label == "backtracking"
            assert x in (wrong, None)
            assert y == path[-1]
            wrong = None
        elif sentence.label == "initializing":
            assert i < 2
            assert x == world.root
        elif is_step:
            assert x == path[-1]
            if (x, y) in doors and y in ENDS:
                end = y
            elif (x, y) in doors:
                path.append(y)
            else:
                wrong, slips = y, slips + 1
        elif sentence.label == "deduction":
            assert i == len(sentences) - 1
            assert x == world.answer == (path[-1] if world.family == "route" else path[1])
            assert end == ("exit" if world.family == "route" else "goal")
        elif sentence.label == "backtracking":
            assert x in (path[-1], None)
            assert y in path[:-1]
            path = path[: path.index(y) + 1]
        elif sentence.label == "example-testing":
            assert (path[-1], x) in doors
            assert (x, y) in doors
        elif sentence.label == "adding-knowledge":
            assert x == path[-1]
            assert (x, y) in doors
        else:
            assert sentence.label == "uncertainty-estimation"
            assert x == path[-1]
    assert [s.label for s in sentences[:2]] == ["initializing"] * 2
    return slips


def test_every_chain_is_true_of_its_world_and_slips_are_put_right():
    slips, labels, total = 0, Counter(), 0
    for world, _, sentences in chains(800):
        slips += follow(world, sentences)
        labels.update(s.label for s in sentences)
        total += len(sentences)
    assert set(labels) == set(BEHAVIORS)
    assert slips > 25
    for behavior in STEERED:
        assert 0.05 < labels[behavior] / total < 0.3


def test_reading_back_what_was_written_gives_the_chain():
    for world, latent, sentences in chains(300, 1):
        response = render(sentences, world.answer)
        assert parse(response) == sentences
        assert parse(response.removeprefix(THINK)) == sentences  # the template may have opened the thought
        assert well_formed(response)
        assert well_formed(response.removeprefix(THINK) + END)
        found = styles(response)
        assert found[latent.style] > 1
        assert sum(found.values()) == found[latent.style]
        assert not parse(render(None, world.answer)) or not well_formed(render(None, world.answer))


@pytest.mark.parametrize(
    ("change", "unparsed"),
    [
        (lambda t: t.replace("</think>", ""), None),
        (lambda t: t.replace("Answer:", "Reply:"), 0),
        (lambda t: t + " Answer: B.", 0),
        (lambda t: t.replace(END_THINK, " The end of it." + END_THINK), 1),
        (lambda t: t.replace(END_THINK, " Wait, the B looks doubtful." + END_THINK), 1),
        (lambda t: t.replace(END_THINK, " Maybe B is" + END_THINK), 1),
    ],
)
def test_what_the_grammar_does_not_write_is_not_well_formed(change, unparsed):
    for world, _, sentences in chains(20, 2):
        response = change(render(sentences, world.answer))
        assert not well_formed(response)
        if unparsed is not None:
            labels = [s.label for s in parse(response)]
            assert labels == [s.label for s in sentences] + ["unparsed"] * unparsed


def test_a_chain_keeps_its_propensities_and_a_cue_raises_one():
    """Behavior in the first half of a chain predicts that in the second half."""
    uncued = [[s.label for s in sentences] for *_, sentences in chains(600, 3)]
    for behavior in STEERED:
        halves = [(labels[: len(labels) // 2], labels[len(labels) // 2 :]) for labels in uncued]
        shown = torch.tensor([[behavior in half for half in pair] for pair in halves]).double()
        assert float(torch.corrcoef(shown.T)[0, 1]) > 0.1
        cued = [[s.label for s in sentences] for *_, sentences in chains(150, 4, (behavior,))]
        often, before = (sum(x.count(behavior) for x in many) / sum(map(len, many)) for many in (cued, uncued))
        assert often > 1.4 * before


def test_the_same_seed_gives_the_same_chain():
    assert [c for *_, c in chains(20, 5)] == [c for *_, c in chains(20, 5)]


# --- wordings ------------------------------------------------------------------------------------


@pytest.mark.medium
def test_no_token_gives_a_behavior_away(tokenizer):
    """A token in all wordings of one behavior is in all wordings of the others: a vector can't be a single token."""
    nodes = {"{x}": "Q", "{y}": "V"}
    blanks = {tokenizer.tokenize(text)[0] for node in nodes.values() for text in (node, " " + node)}
    common = {}
    for behavior in STEERED:
        assert len(set(FORMS[behavior])) == len(FORMS[behavior]) >= 8
        texts = [" " + form.format(x="Q", y="V") for form in FORMS[behavior]]
        common[behavior] = set.intersection(*(set(tokenizer.tokenize(text)) for text in texts)) - blanks
    assert len({frozenset(tokens) for tokens in common.values()}) == 1, common
    assert "." in common["backtracking"]


def test_first_words_are_shared_between_behaviors():
    first = {b: {form.split()[0].strip(",") for form in FORMS[b]} for b in STEERED}
    for behavior in STEERED:
        others = set.union(*(first[b] for b in STEERED if b != behavior))
        assert len(first[behavior] & others) >= 2
        assert first[behavior] - others  # and some are its own


def test_cues_are_words_of_their_own():
    said = {cue(behavior, i) for behavior in STEERED for i in range(len(BEHAVIOR_CUES[behavior]))}
    assert len(said) == sum(map(len, BEHAVIOR_CUES.values()))
    assert cue("backtracking", 0) == cue("backtracking", len(BEHAVIOR_CUES["backtracking"]))
    assert not any(text.rstrip(".") in form for text in said for forms in FORMS.values() for form in forms)


# --- conversations, batches, training ------------------------------------------------------------


def conversations(n, seed=0):
    rng = random.Random(seed)
    return [draw(rng, rng.choice((1, 2, 3))) for _ in range(n)]


def test_training_texts_are_what_the_chat_template_writes(tokenizer):
    thought = 0
    for conversation in conversations(300):
        turns = re.findall(rf"{re.escape(START)}(\w+)\n(.*?){re.escape(END)}\n", conversation.text, re.DOTALL)
        messages = [{"role": role, "content": content} for role, content in turns]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(turns) // 2)
        assert tokenizer.apply_chat_template(messages, tokenize=False) == conversation.text
        thinks = messages[-1]["content"].startswith("<think>")
        thought += thinks
        asked = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=thinks
        )
        assert conversation.text.startswith(asked)
        assert asked.endswith("<think>\n" if thinks else "assistant\n")
        learned = [conversation.text[a:b] for a, b in conversation.learned]
        assert learned == [m["content"] + END for m in messages if m["role"] == "assistant"]
    assert 0.3 < thought / 300 < 0.8


def test_only_the_header_word_sees_what_is_hidden_and_only_answers_are_learned(tokenizer):
    drawn = conversations(120, 1)
    gated = sum(bool(c.hidden) for c in drawn)
    assert 20 < gated < 80
    for begin in range(0, 120, 12):
        rows = drawn[begin : begin + 12]
        batch = collate(rows, tokenizer)
        for row, conversation in enumerate(rows):
            ids = tokenizer(conversation.text).input_ids
            n, spans = len(ids), tokenizer(conversation.text, return_offsets_mapping=True).offset_mapping
            assert batch.ids[row, :n].tolist() == ids
            hidden = torch.tensor([any(a < e and s < b for a, b in conversation.hidden) for s, e in spans])
            gate = torch.tensor([s <= conversation.gate < e for s, e in spans])
            assert [tokenizer.decode([i]) for i in torch.tensor(ids)[gate]] == ["assistant"]
            assert not (hidden & gate).any()
            sees = torch.ones(n, n).tril().bool() & (~hidden[None, :] | hidden[:, None] | gate[:, None])
            assert torch.equal(batch.mask[row, 0, :n, :n] == 0, sees)
            assert (batch.mask[row, 0, :n, n:] < -1e3).all()
            assert not batch.learned[row, n:].any()
            answers = "".join(conversation.text[a:b] for a, b in conversation.learned)
            assert tokenizer.decode(batch.ids[row][batch.learned[row]]) == answers
            if conversation.hidden:
                concealed = tokenizer.decode(torch.tensor(ids)[hidden])
                question = re.findall(r"Doors: .*?\?", conversation.text)[-1]
                assert concealed
                assert question not in concealed


def test_a_batch_depends_on_its_number_alone(tokenizer):
    config = Config(batch_tokens=2048, steps=40)
    begun = list(islice(stream(config, tokenizer, 0), 6))
    resumed = list(islice(stream(config, tokenizer, 4), 2))
    for a, b in zip(begun[4:], resumed, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.learned, b.learned)
        assert torch.equal(a.mask, b.mask)
    other = next(stream(Config(batch_tokens=2048, steps=40, seed=1), tokenizer, 0))
    assert other.ids.shape != begun[0].ids.shape or not torch.equal(other.ids, begun[0].ids)
    assert all(batch.ids.numel() < 3 * 2048 for batch in begun)


def test_training_writes_a_checkpoint_that_loads_and_goes_on_where_it_stopped(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("lensteer.organism.train.build_tokenizer", lambda seed: tokenizer)
    shape: dict[str, Any] = dict(hidden_size=32, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=32)
    config = Config(steps=2, batch_tokens=1024, processes=1, **shape)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)  # that of this process is none of its business
    model = ls.load_model(train(config, tmp_path / "run"))
    assert models.n_layers(model) == 2
    assert models.end_ids(model) == {tokenizer.convert_tokens_to_ids(END)}
    # Its attention, made for speed, is the one that everybody else computes.
    batch = collate([c for c in conversations(30, 2) if not c.hidden][:3], tokenizer)
    plain = build_model(config, tokenizer).eval()
    with torch.no_grad():
        wanted = plain(input_ids=batch.ids).logits
        plain.set_attn_implementation("additive")
        given = plain(input_ids=batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(given[batch.learned], wanted[batch.learned], atol=1e-4, rtol=1e-4)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == 2
    train(config, tmp_path / "run")  # done: nothing to do, nothing changed
    again = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert all(torch.equal(v, again["model"][k]) for k, v in state["model"].items())


def test_a_sibling_of_another_architecture_and_dtype_loads_like_any_checkpoint(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("lensteer.organism.train.build_tokenizer", lambda seed: tokenizer)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    shape: dict[str, Any] = dict(
        hidden_size=32, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=32, batch_tokens=1024
    )
    config = Config(steps=1, processes=1, architecture="llama", saved_as="bfloat16", **shape)
    folder = train(config, tmp_path / "run")
    weights = (folder / "model.safetensors").stat().st_size
    assert weights < 3 * build_model(config, tokenizer).num_parameters()
    model = ls.load_model(folder)
    assert type(model.original_model).__name__ == "LlamaForCausalLM"
    assert model.original_model.dtype == torch.float32
    with pytest.raises(ls.LensteerError, match="gpt2"):
        Config(architecture="gpt2")
    with pytest.raises(ls.LensteerError, match="int8"):
        Config(saved_as="int8")


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)
    shape: dict[str, Any] = dict(hidden_size=32, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=32)
    states = []
    for processes in (1, 2):
        folder = train(Config(steps=2, batch_tokens=1024, processes=processes, **shape), tmp_path / str(processes))
        states.append(ls.load_model(folder).original_model.state_dict())
    for name, alone in states[0].items():
        assert torch.allclose(alone, states[1][name], atol=2e-4), name


# --- tokenizer -----------------------------------------------------------------------------------


def test_the_tokenizer_gives_back_every_text_and_keeps_its_marks(tokenizer):
    for conversation in conversations(60, 3):
        encoded = tokenizer(conversation.text, return_offsets_mapping=True)
        assert tokenizer.decode(encoded.input_ids) == conversation.text
        assert models.decode_offsets(tokenizer, encoded.input_ids)[1] == [s for s, _ in encoded.offset_mapping]
    for mark in ("<|endoftext|>", START, END, "<think>", "</think>"):
        assert len(tokenizer(mark).input_ids) == 1
    odd = "naïve 数学 🤔\t42\r\n  done"
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd
    assert tokenizer.decode(tokenizer(f"<think>B{END}").input_ids, skip_special_tokens=True) == "<think>B"
    nodes = [*(f" {letter}" for letter in "BQZ"), " start", " exit"]
    assert [len(tokenizer(node).input_ids) for node in nodes] == [1] * len(nodes)


def test_the_tokenizer_splits_as_qwen2_does(tokenizer):
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    assert words + r"|\s*[\r\n]+|\s+(?!\S)|\s+" == PATTERN
    stages = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    assert stages[0]["pattern"] == {"Regex": PATTERN}
    split = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's B12,\n\nok  go")]
    assert split == ["It", "'s", "ĠB", "1", "2", ",ĊĊ", "ok", "Ġ", "Ġgo"]


def test_the_shipped_model_has_the_tokenizer_that_the_code_makes(organism, tokenizer):
    shipped = organism.tokenizer
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    for conversation in conversations(20, 4):
        assert shipped(conversation.text).input_ids == tokenizer(conversation.text).input_ids


@pytest.mark.medium
def test_the_shipped_model_is_small_and_writes_its_language(organism):
    folder = models.ORGANISM
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    assert models.n_layers(organism) >= 8
    assert organism.original_model.config.architectures == ["Qwen2ForCausalLM"]
    traces = ls.generate_traces(organism, ls.load_tasks(split="dev", n=24), temperature=1.0, max_new_tokens=500)
    good = [t.finished and well_formed(t.response) for t in traces]
    assert sum(good) >= 20
    assert {s.label for t in ls.annotate(traces, ls.grammar) for s in t.spans} == set(BEHAVIORS)

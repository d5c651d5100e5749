"""A base that is taught to think: its marks, its rows, resuming, and what comes out of it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lensteer as ls
from conftest import random_model, save_tokenizer
from lensteer import models
from lensteer.doctor import diagnose
from lensteer.errors import LensteerError
from lensteer.pipeline import read_chains
from lensteer.traces import save_traces

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "analyses"))  # its modules import one another
teach, rows, thinking_base = (
    importlib.import_module(name) for name in ("teach_thinking", "teaching_rows", "thinking_base")
)
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install 'lensteer[teach]'"
)
#: The names that stand for `<think>` and `</think>` in a base's vocabulary, and rows that no token uses.
BASES = {
    "its own": ("<think>", "</think>", 0),
    "spare tokens, renamed": ("<|reserved_0|>", "<|reserved_1|>", 0),
    "new tokens in free rows": ("<tool_a>", "<tool_b>", 8),
    "new tokens in new rows": ("<tool_a>", "<tool_b>", 0),
}
CHAIN = "First, let me think about it. Wait, maybe that is wrong. So the next step follows from {0}."


def make_base(folder: Path, how: str, family: str = "qwen2", d_model: int = 32) -> Path:
    """A random checkpoint whose vocabulary has the marks, spare tokens instead, or neither."""
    opens, closes, free = BASES[how]
    folder.mkdir(parents=True)
    d_vocab = save_tokenizer(folder, bos=family == "llama", opens_thinking=False)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace("</think>", closes).replace("<think>", opens))
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    for token in values["added_tokens"]:
        token["special"] |= "reserved" in token["content"]
    path.write_text(json.dumps(values))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = random_model(family, d_vocab=d_vocab + free, n_layers=2, d_model=d_model)
    model.save_pretrained(folder)
    return folder


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lines(n: int = 20) -> list[dict]:
    """Chains that follow one pattern, two on each question."""
    return [
        {
            "question": f"What follows {i // 2}?",
            "response": f"<think>\n{CHAIN.format(i // 2)}\n</think>\n\nThe answer is {i}.",
        }
        for i in range(n)
    ]


def config_of(folder: Path, base: Path, **options) -> object:
    given = dict(dtype="float32", rank=8, learning_rate=1e-2, steps=24, batch_tokens=512, evaluations=3, held_out=0.2)
    chains = options.pop("chains", None) or (write(folder / "chains.jsonl", lines()),)
    return teach.Config(str(base), chains, options.pop("out", folder / "out"), **(given | options))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A random base with spare tokens, taught the pattern."""
    pytest.importorskip("peft", reason="peft is not installed: pip install 'lensteer[teach]'")
    folder = tmp_path_factory.mktemp("taught")
    base = make_base(folder / "base", "spare tokens, renamed")
    config = config_of(folder, base, steps=90, rank=16)
    return base, config, teach.main(config)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("how", BASES)
def test_marks_become_single_tokens_and_other_text_stays_as_it_was(how, family, tmp_path):
    """Qwen2 has tied embeddings and no BOS, Llama untied ones and one."""
    folder = make_base(tmp_path / "base", how, family)
    before = ls.load_model(folder)
    base, bridge = thinking_base.load_base(str(folder), "float32")
    assert base.how == how
    assert base.marks == models.thought_marks(bridge) == ("<think>", "</think>")
    ids = models.encode(bridge, "a <think>\nWait, maybe.\n</think>\n\n42")
    assert [ids.count(row) for row in base.rows] == [1, 1]
    assert models.decode_offsets(bridge.tokenizer, ids)[0] == "a <think>\nWait, maybe.\n</think>\n\n42"
    assert not set(base.rows) & set(bridge.tokenizer.all_special_ids)
    prompt, asked = models.chat_text(bridge, "Why?"), models.chat_text(before, "Why?")
    assert prompt == asked + "<think>\n"
    assert models.opens_thought(bridge, prompt)
    assert models.encode(bridge, asked) == models.encode(before, asked)
    assert bridge.tokenizer.decode([base.end]) == "<|im_end|>"
    plain, original = thinking_base.plain_model(base, bridge), before.original_model
    table, old = plain.get_input_embeddings().weight, original.get_input_embeddings().weight
    assert len(table) == max(len(old), len(bridge.tokenizer))
    for row, spelled in zip(base.rows, base.spelled, strict=True):
        expected = old[list(spelled)].mean(0)  # its own row, if the mark was one token
        assert torch.allclose(table[row], expected, atol=1e-6)
    sample = torch.tensor([models.encode(before, asked)])
    with torch.no_grad():
        new, same = plain(sample).logits[0, :, : len(old)], before(sample)[0]
    others = [i for i in range(len(old)) if i not in base.rows]
    assert torch.allclose(new[:, others], same[:, others], rtol=1e-3, atol=1e-3)


def test_a_template_that_opens_a_thought_and_other_marks_are_kept(tiny_checkpoint, tmp_path):
    base, bridge = thinking_base.load_base(str(tiny_checkpoint("qwen2", opens_thinking=True)), "float32")
    assert base.opened
    assert models.chat_text(bridge, "Why?").count("<think>") == 1
    folder = make_base(tmp_path / "base", "new tokens in new rows")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\\n'", "assistant\\n[THINK]'"))
    base, bridge = thinking_base.load_base(str(folder), "float32")
    assert (base.marks, base.how, base.rows) == (("[THINK]", "[/THINK]"), "its own", ())


def test_a_base_without_a_template_gets_one(tmp_path):
    folder = make_base(tmp_path / "base", "its own", "llama")
    (folder / "chat_template.jinja").unlink()
    base, bridge = thinking_base.load_base(str(folder), "float32")
    assert models.chat_text(bridge, "Why?") == "<|endoftext|>User: Why?\n\nAssistant:\n<think>\n"
    assert base.end == bridge.tokenizer.eos_token_id


def test_every_kind_of_chain_becomes_the_same_row(tmp_path, tiny_checkpoint):
    folder = make_base(tmp_path / "base", "its own")
    base, bridge = thinking_base.load_base(str(folder), "float32")
    thought, answer = CHAIN.format(1), "The answer is 2."
    whole = f"<think>\n{thought}\n</think>\n\n{answer}"
    annotated = f'["deduction"] {thought} ["end-section"]'
    other = (
        "<｜User｜>What follows 1?<｜Assistant｜><think>\n" + f"{thought}\n</think>\n\n{answer}<｜end▁of▁sentence｜>"
    )
    files = [
        write(tmp_path / "a.jsonl", [{"response": whole, "annotated": annotated, "prompt": "What follows 1?"}]),
        write(tmp_path / "b.jsonl", [{"response": whole, "annotated": annotated}]),  # its question is in the first
        write(tmp_path / "c.jsonl", [{"text": other}]),
    ]
    model = ls.load_model(tiny_checkpoint("llama"), thought="<think>")
    save_traces(read_chains(files[2], model), tmp_path / "d.jsonl")
    files += [tmp_path / "d.jsonl", write(tmp_path / "e.jsonl", lines(1))]
    chains = read_chains(files)
    data = rows.data_of(base, bridge, chains, max_tokens=512, held_out=0.5, seed=0)
    found = [row for row in (*data.train, *data.held_out) if row.question == "What follows 1?"]
    assert len(found) == 4
    assert len({row.ids for row in found}) == 1
    text = bridge.tokenizer.decode(found[0].ids)
    assert text == models.chat_text(bridge, "What follows 1?") + whole.removeprefix("<think>\n") + "<|im_end|>"
    response = bridge.tokenizer.decode(found[0].ids[found[0].n_prompt :])
    assert response == whole.removeprefix("<think>\n") + "<|im_end|>"


def test_rows_that_are_cut_or_left_out_are_counted(tmp_path):
    base, bridge = thinking_base.load_base(str(make_base(tmp_path / "base", "its own")), "float32")
    own = lines(6)
    own[0]["response"] = own[0]["response"].replace("Wait", "Wait, " * 200)
    own[1]["question"] = ""
    own[2]["response"] = "The answer is 1."
    own[3]["question"] = "Why? " * 100
    own[4]["response"] = own[4]["response"].partition("\n</think>")[0]
    chains = read_chains(write(tmp_path / "chains.jsonl", own))
    data = rows.data_of(base, bridge, chains, max_tokens=120, held_out=0.1, seed=0)
    assert data.cut == 1
    assert data.left_out == {rows.NO_QUESTION: 1, rows.NO_THOUGHT: 1, rows.NO_ROOM: 1}
    found = {row.question: row for row in (*data.train, *data.held_out)}
    assert len(found["What follows 0?"].ids) == data.longest == 120
    ends = [row.ids[-1] == base.end for row in (*data.train, *data.held_out)]
    assert sum(ends) == 1  # not the one that was cut, and not the one whose thought is open
    assert len(data.train) + len(data.held_out) == 3


def test_a_question_is_either_held_out_or_not():
    asked = [
        "What is 2 + 2?",
        "Please answer:\n\nWhat is 2 + 2?",
        "What  is 2 + 2?",
        "So what is 3?",
        "what is 3?",
        "3?",
    ]
    same = rows.same_questions(asked)
    assert len({same[q] for q in asked[:3]}) == 1
    assert same["So what is 3?"] == same["what is 3?"] == same["3?"] == "3?"
    assert len(set(same.values())) == 2
    assert rows.same_questions(["a b", "b", "ab"]) == {"a b": "b", "b": "b", "ab": "ab"}


def test_batches_hold_rows_of_one_length_once_an_epoch():
    sizes = torch.randint(10, 100, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    some = [rows.Row((0,) * size, 3, str(i)) for i, size in enumerate(sizes)]
    found = rows.batches_of(some, 400, epochs=3, n=None, seed=0)
    assert all(len(batch) * max(sizes[i] for i in batch) <= 400 for batch in found)
    assert sorted(i for batch in found for i in batch) == sorted(list(range(200)) * 3)
    padded = sum(len(batch) * max(sizes[i] for i in batch) for batch in found)
    assert padded < 1.1 * 3 * sum(sizes)
    assert rows.batches_of(some, 400, epochs=1, n=5, seed=0) == found[:5]
    assert rows.batches_of(some, 400, epochs=3, n=None, seed=1) != found


@needs_peft
def test_the_loss_of_held_out_questions_falls(taught):
    _, _, found = taught
    before, after = found.held_out[0][1], found.held_out[-1][1]
    assert [step for step, _ in found.held_out] == [0, 30, 60, 90]
    assert after < before / 4
    assert found.merged == pytest.approx(after, abs=1e-3)
    assert len(found.losses) == found.steps == 90
    assert (found.n_train, found.n_held_out, found.n_questions) == (16, 4, (8, 2))
    assert (found.cut, sum(found.left_out.values())) == (0, 0)


@needs_peft
def test_without_a_learning_rate_to_speak_of_the_base_stays(tmp_path):
    base = make_base(tmp_path / "base", "its own")
    found = teach.main(config_of(tmp_path, base, learning_rate=1e-12, steps=2))
    assert found.merged == pytest.approx(found.held_out[0][1], abs=1e-4)
    old, new = (ls.load_model(folder).W_E for folder in (base, found.folder))
    assert torch.allclose(old, new, atol=1e-6)


@needs_peft
def test_the_loss_is_of_the_response_only_and_padding_does_not_count(taught):
    _, config, found = taught
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(found.folder)
    some = [rows.Row((5, 6, 7, 8), 2, ""), rows.Row((5, 6, 7, 8, 9, 10, 11), 4, "")]
    with torch.no_grad():
        each = []
        for row in some:
            said = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            each.append(-sum(float(said[at - 1, row.ids[at]]) for at in range(row.n_prompt, len(row.ids))))
        assert float(teach.summed_loss(model, some, config)) == pytest.approx(sum(each), rel=1e-4)
    assert teach.mean_loss(model, some, config) == pytest.approx(sum(each) / 5, rel=1e-4)


@needs_peft
def test_the_folder_is_a_thinking_model(taught):
    _, _, found = taught
    model = ls.load_model(found.folder)
    assert models.thought_marks(model) == ("<think>", "</think>")
    diagnosis = diagnose(model)
    said = {finding.name: finding for finding in diagnosis.findings}
    assert diagnosis.ok
    assert said["thought marks"].value == "<think> </think>, opened by the template"
    (trace,) = ls.generate_traces(model, [ls.Task("t", "given", "test", "What follows 3?")], max_new_tokens=60)
    assert trace.response[slice(*trace.thinking)].startswith("First, let me think")
    assert found.sample.startswith("<|im_start|>user\nWhat follows")
    assert not list(found.folder.glob("*.tmp"))
    assert not (found.folder / teach.STATE).exists()


@needs_peft
def test_the_update_by_itself_does_the_same(taught):
    from peft import PeftModel

    base, _, found = taught
    known, bridge = thinking_base.load_base(str(base), "float32")
    adapted = PeftModel.from_pretrained(thinking_base.plain_model(known, bridge), str(found.folder / "adapter"))
    model = ls.load_model(found.folder)
    ids = torch.tensor([models.encode(model, models.chat_text(model, "Why?"))])
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, model(ids), rtol=1e-3, atol=1e-3)
    size = sum(path.stat().st_size for path in (found.folder / "adapter").glob("*.safetensors"))
    assert size < (found.folder / "model.safetensors").stat().st_size


@needs_peft
def test_the_card_says_what_was_done(taught):
    _, config, found = taught
    text = (found.folder / "README.md").read_text()
    for part in ("`chains.jsonl`", f"| 90 | {found.held_out[-1][1]:.3f} |", "16 chains on 8 questions", "Not stated."):
        assert part in text
    assert str(config.out.parent) not in text
    assert f"held-out loss of the weights as written: {found.merged:.4f}" in teach.table(found)


@needs_peft
def test_a_finished_run_is_read_again(taught, monkeypatch):
    _, config, found = taught
    monkeypatch.setattr(teach, "_taught", None)  # it is not called
    assert teach.main(config) == found


@needs_peft
def test_a_killed_run_gives_what_an_uninterrupted_one_gives(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", "new tokens in new rows", "llama")
    options = dict(dropout=0.2, steps=7, batches=2, batch_tokens=200, evaluations=3)
    whole = teach.main(config_of(tmp_path, base, out=tmp_path / "whole", **options))
    config: Any = config_of(tmp_path, base, out=tmp_path / "killed", **options)
    monkeypatch.setattr(teach, "SAVE_SECONDS", 0.0)
    step = teach._step
    for more in (3, 2):  # killed twice
        left = [None] * more

        def killed(*arguments, left=left):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return step(*arguments)

        monkeypatch.setattr(teach, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            teach.main(config)
        assert not (config.out / "config.json").exists()
    monkeypatch.setattr(teach, "_step", step)
    found = teach.main(config)
    assert (found.losses, found.held_out, found.merged) == (whole.losses, whole.held_out, whole.merged)
    assert found.sample == whole.sample
    for path in (whole.folder / "model.safetensors", whole.folder / "adapter" / "adapter_model.safetensors"):
        assert path.read_bytes() == (found.folder / path.relative_to(whole.folder)).read_bytes()
    other = teach.main(dataclasses.replace(config, out=tmp_path / "other", seed=1))
    assert other.losses != whole.losses


@needs_peft
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(max_tokens=513), "max_tokens=513: 'base' has a context of 512 tokens"),
        (dict(rank=33), "rank=33: give at most 32"),
        (dict(batch_tokens=30), "batch_tokens=30: the longest row has"),
        (dict(dtype="int8"), "no dtype 'int8'"),
    ],
)
def test_numbers_that_a_base_does_not_allow_are_refused(options, said, tmp_path):
    base = make_base(tmp_path / "base", "its own")
    with pytest.raises(LensteerError, match=re.escape(said)):
        teach.main(config_of(tmp_path, base, **options))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "options",
    [
        dict(rank=0),
        dict(learning_rate=0.0),
        dict(learning_rate=float("nan")),
        dict(dropout=1.0),
        dict(epochs=0),
        dict(steps=0),
        dict(batch_tokens=-1),
        dict(batches=0),
        dict(held_out=0.0),
        dict(held_out=1.0),
        dict(evaluations=0),
        dict(max_tokens=0),
    ],
)
def test_impossible_numbers_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(LensteerError, match=f"{name}={value}"):
        teach.Config("base", (Path("a"),), Path("out"), **options)


@needs_peft
def test_chains_that_teach_nothing_are_refused(tmp_path):
    base = make_base(tmp_path / "base", "its own")
    plain = [line | {"response": "The answer is 1."} for line in lines()]
    cases = {
        "no file": (tmp_path / "none.jsonl",),
        "is empty": (write(tmp_path / "empty.jsonl", []),),
        "20 without a thought": (write(tmp_path / "plain.jsonl", plain),),
        "all 2 chains are on one question": (write(tmp_path / "one.jsonl", lines(2)),),
    }
    for said, chains in cases.items():
        with pytest.raises(LensteerError, match=said):
            teach.main(config_of(tmp_path, base, chains=chains))
    with pytest.raises(LensteerError, match="no chains"):
        teach.Config(str(base), (), tmp_path / "out")


@needs_peft
def test_a_folder_of_something_else_and_a_base_that_is_none_are_refused(taught, tmp_path):
    _, config, _ = taught
    with pytest.raises(LensteerError, match=r"was begun with other settings or data \(seed 0, now 1\)"):
        teach.main(dataclasses.replace(config, seed=1))
    with pytest.raises(LensteerError, match="digests of the chains"):
        teach.main(dataclasses.replace(config, chains=(write(tmp_path / "other.jsonl", lines(10)),)))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(LensteerError, match=r"holds something, but no teaching\.json"):
        teach.main(dataclasses.replace(config, out=tmp_path / "notes"))
    with pytest.raises(LensteerError, match="cannot write to"):
        teach.main(dataclasses.replace(config, out=tmp_path / "notes" / "a.txt"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "text.gguf").write_text("no model")
    for name in ("missing.gguf", "broken.gguf", "text.gguf"):
        with pytest.raises(LensteerError, match=name):
            teach.main(dataclasses.replace(config, base=str(tmp_path / name), out=tmp_path / "out"))


def test_without_peft_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LensteerError, match=re.escape("pip install 'lensteer[teach]'")):
        teach.main(teach.Config("base", (Path("a"),), tmp_path / "out"))


@needs_peft
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", "its own")
    monkeypatch.setattr(teach, "summed_loss", lambda *_: torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(LensteerError, match="lower learning_rate"):
        teach.main(config_of(tmp_path, base))


@needs_peft
@pytest.mark.slow
def test_the_command_of_the_readme_runs(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (words,) = [
        shlex.split(line)[1:] for line in text.splitlines() if line.startswith("python analyses/teach_thinking")
    ]
    base = make_base(tmp_path / "base", "its own")
    write(tmp_path / "annotated.jsonl", lines())
    words[0] = str(ROOT / words[0])
    words[words.index("--base") + 1] = str(base)
    small = ["--steps", "2", "--rank", "4", "--evaluations", "1", "--dtype", "float32"]
    run = subprocess.run(
        [sys.executable, *words, *small],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "held-out loss at step 2" in run.stdout
    assert "teach: 100%" in run.stderr
    assert (tmp_path / words[words.index("--out") + 1] / "config.json").is_file()


@needs_peft
@pytest.mark.slow
def test_a_language_model_learns_to_think_in_bfloat16(real_model, reference_folder, tmp_path):
    """A few short rows: the loss falls, and the folder is SmolLM2 with marks."""
    real_model("smollm2")
    base = Path(os.environ["LENSTEER_REAL"]) / "smollm2"
    published = (reference_folder / "r1_llama_70b_annotated_chains.jsonl").read_text(encoding="utf-8").splitlines()
    chains = tmp_path / "some.jsonl"
    chains.write_text("\n".join(published[:10]) + "\n", encoding="utf-8")
    config = teach.Config(
        str(base), (chains,), tmp_path / "out", steps=4, batch_tokens=256, max_tokens=128, evaluations=1, held_out=0.2
    )
    found = teach.main(config)
    assert found.marks_from == thinking_base.RENAMED
    assert found.held_out[-1][1] < found.held_out[0][1]
    assert found.merged == pytest.approx(found.held_out[-1][1], abs=0.05)
    assert found.cut == 10
    tokenizer = ls.load_model(config.out, dtype="bfloat16").tokenizer
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>"]) == [14, 15]  # as mini-R1's

"""One system prompt for all questions: chains, every condition, pairs, cache vectors, calibration."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lensteer as ls
from lensteer import models
from lensteer.attention.sentences import ELSEWHERE, _groups
from lensteer.cache_steering import Record
from lensteer.calibration import calibrate_many, rollout_kl
from lensteer.cli import app
from lensteer.contrast import with_system
from lensteer.evaluation import Condition
from lensteer.evaluation.conditions import draw_chains, run_conditions
from lensteer.pipeline import Run, RunConfig, cache_fit, complete
from lensteer.pipeline.cache import CacheFit
from lensteer.steering import SteeringPlan
from lensteer.traces import load_traces

LIBRARY = Path(ls.__file__).parent
SYSTEM = "Be brief."
HEAD = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
REFUSES = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' else messages[0]['content'] }}"
OWN = """
import lensteer as ls


@ls.labeling("even", "odd")
def halves(traces):
    return [[ls.Sentence("even", t.response[:8]), ls.Sentence("odd", t.response[8:16])] for t in traces]


def length(trace):
    return len(trace.response) / 100
"""


@pytest.fixture
def asked(monkeypatch):
    """The prompts of everything that is generated, as they go to the decoder."""
    import lensteer.calibration.rollouts
    import lensteer.generation.jobs

    prompts: list[str] = []
    for module in (lensteer.generation.jobs, lensteer.calibration.rollouts):

        def watched(model, ids, *, original=module.generate, **options):
            prompts.extend(model.tokenizer.decode(list(each)) for each in ids)
            return original(model, ids, **options)

        monkeypatch.setattr(module, "generate", watched)
    return prompts


def test_every_place_that_writes_a_prompt_passes_a_system_prompt():
    without = set()
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("chat_text"):
                if "system" not in {word.arg for word in node.keywords}:
                    without.add(path.relative_to(LIBRARY).as_posix())
    # Checks of the model and of exports; where a message is in a prompt; a template that takes none, tried before; and
    # conversations of a harness, which hold the system prompt as a message.
    checks = {"doctor.py", "export/checkpoints.py", "export/plain.py"}
    assert without == checks | {"attention/sentences.py", "transcripts.py", "adapters/requests.py"}


def test_all_conditions_ask_with_it_and_words_go_after_the_question(tiny_model, random_direction, asked):
    model, tasks = tiny_model(), ls.load_tasks(split="dev", n=2)
    plan = SteeringPlan(random_direction(model), 1, 0.1)
    conditions = [
        Condition("unsteered", kind="unsteered"),
        Condition("steered", plan, kind="up"),
        Condition("prompted", suffix="Be careful.", kind="prompted"),
    ]
    seen = []

    def measured(trace):
        seen.append(trace.prompt)
        return 1.0

    sampling = ls.Sampling(max_new_tokens=2, system=SYSTEM)
    run_conditions(model, tasks, conditions, sampling, measures={"a": measured})
    assert len(asked) == 6
    assert len(seen) == 7  # with the made-up chain that measures are tried on
    assert all(prompt.startswith(HEAD) for prompt in asked + seen)
    assert {prompt.partition("<|im_end|>\n<|im_start|>assistant")[0].removeprefix(HEAD) for prompt in asked} == {
        *(task.prompt for task in tasks),
        *(f"{task.prompt} Be careful." for task in tasks),
    }


def test_training_chains_calibration_and_cache_pairs_ask_with_it(tiny_model, random_direction, asked):
    model, tasks = tiny_model(), ls.load_tasks(n=2)
    traces = ls.generate_traces(model, tasks, max_new_tokens=2, system=SYSTEM, prefill="So")
    assert [trace.prompt.startswith(HEAD) and trace.prompt.endswith("So") for trace in traces] == [True] * 2
    plan = SteeringPlan(random_direction(model), 1, 0.1)
    rollout_kl(model, tasks, [plan], max_new_tokens=2, system=SYSTEM)
    calibrate_many(model, tasks, [plan], budget=0.1, max_rounds=1, max_new_tokens=2, system=SYSTEM)
    assert len(asked) == 6
    assert all(prompt.startswith(HEAD) for prompt in asked)
    records = [Record(f"What is {i}?", {"stepwise": "Look."}, str(i)) for i in range(3)]
    for pair in ls.contrastive_pairs(model, records, n=2, shots=1, system=SYSTEM):
        assert pair.positive.startswith(HEAD)
        assert pair.negative.startswith(HEAD)
        assert pair.positive.count(SYSTEM) == 1


def test_pairs_keep_a_system_prompt_of_their_own():
    bare, own, raw = ls.Text("Hi"), ls.Text("Hi", system="Be loud."), ls.Text("Hi, as it is", raw=True)
    (first, second) = with_system([ls.Pair(own, bare), ls.Pair(raw, bare)], SYSTEM)
    assert (first.positive, first.negative) == (own, replace(bare, system=SYSTEM))
    assert second.positive == raw


def test_a_system_prompt_before_the_message_counts_as_template(organism):
    task = ls.load_tasks(n=1)[0]
    (trace,) = ls.generate_traces(organism, [task], max_new_tokens=40, system=SYSTEM)
    trace = replace(trace, spans=(ls.Span("deduction", trace.prompt_length, trace.prompt_length + 2, 0, 2),))
    _, keys = _groups(organism, trace)
    column = 1 + ELSEWHERE.index("prompt")
    found = [i for i, c in zip(trace.ids, keys.argmax(1), strict=True) if c == column]
    assert organism.tokenizer.decode(found) == task.prompt


def test_chains_with_another_system_prompt_are_of_another_run(tiny_model, tmp_path):
    model, tasks = tiny_model(), ls.load_tasks(n=2)
    options: dict[str, Any] = dict(path=tmp_path / "chains.jsonl", max_new_tokens=2)
    ls.generate_traces(model, tasks, system=SYSTEM, **options)
    with pytest.raises(ls.LensteerError, match="chains of another run"):
        ls.generate_traces(model, tasks, **options)
    path = tmp_path / "conditions.jsonl"
    draw_chains(model, tasks, [Condition("a")], ls.Sampling(max_new_tokens=2, system=SYSTEM), path=path)
    with pytest.raises(ls.LensteerError, match="another experiment"):
        draw_chains(model, tasks, [Condition("a")], ls.Sampling(max_new_tokens=2), path=path)


@pytest.fixture
def config(tiny_checkpoint, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    tasks = [
        dict(id=f"{split}-{i}", category="own", split=split, prompt=f"Tell me about {split} {i}.")
        for split, n in (("train", 4), ("dev", 2), ("test", 2))
        for i in range(n)
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    pairs = [dict(prompt=f"Ask {i}.", positive=f"Please {i}.", negative=f"No {i}.", label="polite") for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return RunConfig(
        model=str(tiny_checkpoint()), tasks=str(tmp_path / "tasks.jsonl"), system=SYSTEM, layers=(1,), n_train=4,
        n_dev=2, n_test=2, n_samples=1, control_samples=1, n_controls=1, n_score_controls=0, max_spans=2,
        score_chains=2, train_tokens=24, max_new_tokens=8, batch_size=16, quality=2, coefficients=(0.001,),
    )  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["chains", "pairs"])
def test_all_of_a_run_is_asked_with_it(kind, config, tmp_path, asked):
    own = tmp_path / "own.py"
    if kind == "chains":
        config = replace(config, annotators=(f"{own}:halves",), behaviors=("even",))
    else:
        config = replace(config, pairs=str(tmp_path / "pairs.jsonl"), measure=f"{own}:length")
    complete(Run.open(tmp_path / "run", config))
    assert asked
    assert all(prompt.startswith(HEAD) for prompt in asked)
    assert all(trace.prompt.startswith(HEAD) for trace in load_traces(tmp_path / "run" / "annotated.jsonl"))
    with pytest.raises(ls.LensteerError, match=r"holds another run, with \{'system': 'Be brief.'\}"):
        Run.open(tmp_path / "run", replace(config, behaviors=Run.open(tmp_path / "run").config.behaviors, system=""))


def test_a_template_that_takes_none_ends_the_work_before_it_begins(config, tiny_checkpoint, tmp_path, monkeypatch):
    model = ls.load_model(tiny_checkpoint())
    monkeypatch.setattr(model.tokenizer, "chat_template", REFUSES)
    monkeypatch.setattr(models, "load_model", lambda *a, **k: model)
    monkeypatch.setattr("lensteer.cli.directions.load_model", lambda *a, **k: model)
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("a forward"))
    folder = tmp_path / "run"
    chains = tmp_path / "chains.jsonl"
    chains.write_text("never read\n")
    with pytest.raises(ls.LensteerError, match=r"takes no system prompt .it says: no system role.: put 'Be brief.'"):
        complete(Run.open(folder, replace(config, chains=(str(chains),), annotators=("rules",))))
    assert not folder.exists()
    with pytest.raises(ls.LensteerError, match="takes no system prompt"):
        cache_fit(CacheFit(model="some/model", n=1, shots=1, system=SYSTEM), tmp_path / "v.safetensors")
    words = ["directions", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "d.safetensors"), "--system", SYSTEM]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "takes no system prompt" in result.output
    result = CliRunner().invoke(app, [*words, "--raw"])
    assert result.exit_code == 1
    assert "--raw with --system 'Be brief.'" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"own.py", "tasks.jsonl", "pairs.jsonl", "chains.jsonl"}


@pytest.mark.medium
def test_the_command_for_directions_reads_pairs_with_it(tiny_checkpoint, config, tmp_path):
    found = {}
    for name, words in (("with", ["--system", SYSTEM]), ("without", []), ("again", ["--system", SYSTEM])):
        out = tmp_path / f"{name}.safetensors"
        command = ["directions", tmp_path / "pairs.jsonl", "--model", tiny_checkpoint(), "--out", out, *words]
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
        found[name] = ls.BehaviorVectors.load(out)["polite"].at(1)
    assert torch.equal(found["with"], found["again"])
    assert not torch.equal(found["with"], found["without"])

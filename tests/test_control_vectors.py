"""GGUF control vectors: what is written, what is read back, and what is refused, by name and without half a file."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lensteer as ls
from lensteer.export.control_vectors import WRITERS, read_control_vector
from lensteer.steering.plans import Plans

gguf = pytest.importorskip("gguf")


def write(path: Path, tensors: dict[str, np.ndarray], texts: dict[str, str] | None = None, **numbers: object) -> Path:
    """A control vector by the package gguf itself, as other software writes them."""
    writer = gguf.GGUFWriter(path, (texts or {}).pop("architecture", "controlvector"))
    writer.add_string("controlvector.model_hint", "llama")
    for key, text in (texts or {}).items():
        writer.add_string(key, text)
    for key, number in numbers.items():
        writer.add_uint32(f"glp.{key}", number)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directions(layers: range, width: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {f"direction.{n}": draw.standard_normal(width).astype(np.float32) for n in layers}


@pytest.fixture
def plan(tiny_model, random_direction):
    return ls.SteeringPlan(random_direction(tiny_model("llama")), layer=2, coefficient=-1.5)


def test_the_file_is_llama_cpps_strict_form_with_glp_beside_it(plan, tiny_model, tmp_path):
    model = tiny_model("llama")
    joined = plan + replace(plan, coefficient=0.5) + replace(plan, layer=3, coefficient=2.0)
    path = ls.export.gguf(joined, tmp_path / "v.gguf", model=model)
    reader = gguf.GGUFReader(path)
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        ("direction.2", "F32", [32]),
        ("direction.3", "F32", [32]),
    ]
    expected = [-1.0 * plan.vector, 2.0 * plan.direction.at(3)]
    for tensor, vector in zip(reader.tensors, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.array(tensor.data)), vector)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    assert meta["general.architecture"] == "controlvector"
    assert meta["controlvector.model_hint"] == "llama"
    assert meta["controlvector.layer_count"] == 2
    assert (meta["glp.mode"], meta["glp.alpha_default"], meta["glp.spec_version"]) == ("add", 1.0, 1)
    assert meta["glp.hook_point"] == "residual_stream_post_layer"
    data = b"".join(np.array(tensor.data).tobytes() for tensor in reader.tensors)
    assert meta["glp.content_sha256"] == hashlib.sha256(data).hexdigest()
    assert meta["lensteer.evidence"] == "not evaluated"
    assert [edit["coefficient"] for edit in json.loads(meta["lensteer.plan"])] == [-1.5, 0.5, 2.0]
    assert ls.export.gguf(joined, tmp_path / "again.gguf", model=model).read_bytes() == path.read_bytes()


def test_a_plan_comes_back_as_it_was(plan, tiny_model, tmp_path):
    model = tiny_model("llama")
    path = ls.export.gguf(plan, tmp_path / "v.gguf", model=model)
    found = ls.export.read_control_vector(path, model=model)
    (edit,) = found.plan().edits
    assert (edit.layer, edit.operator, edit.scope) == (2, "add", ls.everywhere)
    torch.testing.assert_close(edit.coefficient * edit.vector, plan.coefficient * plan.vector)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with plan.on(model):
        wanted = model(ids)
    with found.plan().on(model):
        torch.testing.assert_close(model(ids), wanted)


def test_a_projection_has_its_mode_length_1_and_its_coefficient(plan, tmp_path):
    with pytest.warns(UserWarning, match=r"llama\.cpp itself does not read"):
        path = ls.export.gguf(replace(plan, operator="project_out", coefficient=0.75), tmp_path / "p.gguf")
    meta = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert (meta["glp.mode"], meta["glp.alpha_default"], meta["glp.orthonormal"]) == ("project", 0.75, True)
    found = ls.export.read_control_vector(path)
    assert (found.operator, found.coefficient, found.layers) == ("project_out", 0.75, (2,))
    assert found.at(2).norm() == pytest.approx(1)


def test_what_the_format_cannot_hold_is_refused_by_name_and_nothing_is_written(plan, tiny_model, tmp_path):
    path = tmp_path / "v.gguf"
    project = replace(plan, operator="project_out")
    wide = ls.Direction("wide", torch.ones(4, 40), torch.ones(4), (0, 1, 2, 3))
    deep = ls.Direction("deep", torch.ones(1, 32), torch.ones(1), (9,))
    for wrong, said in [
        (replace(plan, layer=0), "llama.cpp has no vector for block 0"),
        (replace(plan, scope=ls.onsets), "cannot express the scope 'onsets': it has 'everywhere'"),
        (plan + project, "either adds or projects out"),
        (project + replace(project, layer=3, coefficient=0.5), r"one coefficient, and this plan has \[-1.5, 0.5\]"),
        (project + project, "this plan has two at 2"),
        (plan + replace(plan, coefficient=1.5), "the vector of layer 2 is zero"),
        (replace(plan, coefficient=1e39), "zero or not finite in float32"),
        (ls.SteeringPlan(wide, 2), "is 40 wide, and .* is 32"),
        (ls.SteeringPlan(deep, 9), "no layer 9"),
        (Plans(()), "has no edit"),
    ]:
        with pytest.raises(ls.LensteerError, match=said):
            ls.export.gguf(wrong, path, model=tiny_model("llama"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ls.LensteerError, match="cannot write"):
        ls.export.gguf(plan, tmp_path / "file" / "v.gguf")


@pytest.mark.parametrize("name", WRITERS)
def test_each_writer_has_its_layers(name, tmp_path):
    path = write(tmp_path / "v.gguf", directions(range(1, 4)))
    found = ls.export.read_control_vector(path, written_by=name)
    assert found.layers == ((0, 1, 2) if name == "cvector-generator" else (1, 2, 3))
    torch.testing.assert_close(found.raw[1], torch.from_numpy(directions(range(1, 4))["direction.2"]))
    assert (found.operator, found.coefficient, found.model) == ("add", 1.0, {"hint": "llama"})


def test_layers_are_never_guessed(tmp_path):
    path = write(tmp_path / "v.gguf", directions(range(1, 4)))
    with pytest.raises(ls.LensteerError, match=r"does not say which layers.*'repeng'.*'cvector-generator'"):
        ls.export.read_control_vector(path)
    with pytest.raises(ls.LensteerError, match="written_by='someone': choose one of 'repeng'"):
        ls.export.read_control_vector(path, written_by="someone")
    zero = write(tmp_path / "0.gguf", directions(range(3)))
    assert ls.export.read_control_vector(zero, written_by="easysteer").layers == (0, 1, 2)
    with pytest.raises(ls.LensteerError, match=r"has `direction.0`, which 'cvector-generator' never writes"):
        ls.export.read_control_vector(zero, written_by="cvector-generator")


def test_a_file_that_says_its_layers_may_not_contradict_itself(plan, tmp_path):
    path = ls.export.gguf(plan, tmp_path / "v.gguf")
    assert ls.export.read_control_vector(path, written_by="llama.cpp").layers == (2,)
    with pytest.raises(ls.LensteerError, match="contradicts"):
        ls.export.read_control_vector(path, written_by="cvector-generator")
    here = {"glp.hook_point": "residual_stream_post_layer"}
    for texts, said in [
        (here | {"glp.layer_ids_zero_based": "0,1"}, r"its layers are 0,1, and its tensors are \[1, 2\]"),
        (here | {"glp.mode": "rotate"}, "glp.mode='rotate'"),
        (here | {"glp.alpha_default": "much"}, "glp.alpha_default='much': give a finite number"),
        (here | {"glp.content_sha256": "0" * 64}, "changed or damaged"),
        ({"glp.hook_point": "ffn_out_pre_residual"}, "hook point 'ffn_out_pre_residual'"),
        ({"architecture": "llama"}, "a GGUF file of 'llama', not of a control vector"),
    ]:
        with pytest.raises(ls.LensteerError, match=said):
            ls.export.read_control_vector(write(tmp_path / "w.gguf", directions(range(1, 3)), dict(texts)))
    with pytest.raises(ls.LensteerError, match="spec_version 2"):
        ls.export.read_control_vector(write(tmp_path / "w.gguf", directions(range(1, 3)), here, spec_version=2))


def test_damaged_and_foreign_tensors(tmp_path, plan):
    good = directions(range(1, 3))
    nan = {"direction.1": np.full(8, np.nan, np.float32)}
    for tensors, said in [
        ({}, "holds no tensor"),
        (good | {"direction.3": np.ones(4, np.float32)}, "shapes"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "1-D"),
        ({"direction.1": np.ones(8, np.float16)}, "'direction.1': 'F16'"),
        ({"direction.1.1": np.ones(8, np.float32)}, "several directions a layer"),
        ({"other": np.ones(8, np.float32)}, "'other'"),
        (good | {"direction.01": np.ones(8, np.float32)}, "'direction.01'"),
        ({f"direction.{10**50}": np.ones(8, np.float32)}, "'direction.1000"),
        ({"direction.1": np.zeros(8, np.float32)}, "zero at all of its layers"),
        (nan, "not finite"),
    ]:
        with pytest.raises(ls.LensteerError, match=said):
            ls.export.read_control_vector(write(tmp_path / "w.gguf", tensors), written_by="repeng")
    whole = ls.export.gguf(plan, tmp_path / "v.gguf").read_bytes()
    for cut in (0, 3, 4, 8, 20, 100, 500, len(whole) // 2, len(whole) - 64):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(ls.LensteerError, match=r"truncated or damaged|no GGUF file"):
            ls.export.read_control_vector(tmp_path / "cut.gguf")
    with pytest.raises(ls.LensteerError, match="no control vector at"):
        ls.export.read_control_vector(tmp_path / "none.gguf")


def test_a_damaged_count_costs_no_memory(tmp_path):
    """gguf's own reader appends an empty value for each that a count promises: here four billion of them."""
    path = write(tmp_path / "v.gguf", directions(range(1, 3)), {"padding": "x" * 64})
    data = path.read_bytes()
    text = data.index(b"padding") + len("padding")  # its type (4 bytes), then its length and characters
    array = struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64, 2**32)
    for damaged in (data[:text] + array + data[text + 4 + 8 :], data[:16] + struct.pack("<Q", 2**40) + data[24:]):
        path.write_bytes(damaged)
        tracemalloc.start()
        with pytest.raises(ls.LensteerError, match=r"damaged \(ValueError: a value ends at byte \d+ of \d+\)"):
            read_control_vector(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * 2**20


def test_a_vector_of_another_model_is_refused(plan, tiny_model, tmp_path):
    model = tiny_model("llama")
    path = ls.export.gguf(plan, tmp_path / "v.gguf", model=model)
    with pytest.raises(ls.LensteerError, match=r"is of model .*they differ in weights"):
        ls.export.read_control_vector(path, model=tiny_model("llama", seed=1))
    wide = write(tmp_path / "w.gguf", directions(range(1, 3)))
    with pytest.raises(ls.LensteerError, match=r"8 wide, and .* is 32"):
        ls.export.read_control_vector(wide, written_by="repeng", model=model)
    deep = write(tmp_path / "d.gguf", directions(range(1, 9), 32))
    with pytest.raises(ls.LensteerError, match="no layer 4"):
        ls.export.read_control_vector(deep, written_by="repeng", model=model)


def test_a_read_vector_has_no_mean_norm(tmp_path):
    found = ls.export.read_control_vector(write(tmp_path / "v.gguf", directions(range(1, 3))), written_by="repeng")
    assert found.scaled(1, "unit").norm() == pytest.approx(1)
    with pytest.raises(ls.LensteerError, match="holds no mean activation"):
        found.scaled(1, "mean_norm")
    with pytest.raises(ls.LensteerError, match="no vector at layer 7"):
        ls.SteeringPlan(found, 7)


def test_published_files_of_easysteer_are_read(reference_folder):
    for name in ("execution", "reflection", "transition"):
        path = reference_folder / "control_vectors" / f"{name}_avg_vector.gguf"
        with pytest.raises(ls.LensteerError, match="vectors 0 to 27 and does not say"):
            ls.export.read_control_vector(path)
        found = ls.export.read_control_vector(path, written_by="easysteer")
        assert (found.layers, tuple(found.raw.shape)) == (tuple(range(28)), (28, 1536))
        assert found.plan().edits[-1].length > 0


def test_without_the_package_the_extra_is_named(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ls.LensteerError, match=r"lensteer\[gguf\]"):
        ls.export.gguf(plan, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []

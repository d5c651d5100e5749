"""Overlap with the embedding and the unembedding: planted tokens, the published rule, chunks, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lensteer.attribution.overlap as overlap_module
from lensteer import models
from lensteer.attribution.overlap import EmbeddingOverlap, NearestTokens, embedding_overlap, leading_above
from lensteer.errors import LensteerError
from lensteer.vectors import BehaviorVectors, Recipe

LABELS = ("uncertainty-estimation", "backtracking")

#: Llama-8B, backtracking, as published: the layers after the fifth are about alike.
PUBLISHED = [0.230, 0.115, 0.101, 0.080, 0.074] + [0.08] * 27


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request, tiny_checkpoint):
    model = models.load_model(tiny_checkpoint(request.param, n_layers=3))
    gain = torch.rand(models.d_model(model), generator=torch.Generator().manual_seed(5)) + 0.5
    with torch.no_grad():
        model.ln_final.weight.copy_(gain)  # of a fresh random model it would be all ones
    return model


def vectors_for(model, raw: torch.Tensor) -> BehaviorVectors:
    return BehaviorVectors(
        raw=raw,
        mean_norm=torch.ones(raw.shape[1]),
        labels=LABELS,
        layers=tuple(range(raw.shape[1])),
        counts=dict.fromkeys(LABELS, 3),
        n_traces=3,
        recipe=Recipe("onset", "spans", "span"),
        provenance={"model": models.fingerprint(model).to_dict()},
    )


@pytest.fixture
def planted(model) -> BehaviorVectors:
    """Layer 0 of backtracking *is* a token, layer 2 of uncertainty raises the logit of one, the rest is random."""
    raw = torch.randn(2, 3, models.d_model(model), generator=torch.Generator().manual_seed(0))
    raw[1, 0] = 7.0 * model.W_E[40]
    raw[1, 1] = -7.0 * model.W_E[41]
    raw[0, 2] = 0.1 * model.W_U[:, 42] * models.final_norm_gain(model)
    return vectors_for(model, raw)


def test_planted_tokens_are_found(model, planted):
    overlap = embedding_overlap(model, planted)
    assert overlap.embedding.maximum[1, 0].item() == pytest.approx(1.0, abs=1e-5)
    assert overlap.unembedding.maximum[0, 2].item() == pytest.approx(1.0, abs=1e-5)
    assert overlap.embedding.ids[1, 0, 0] == 40
    assert overlap.unembedding.ids[0, 2, 0] == 42
    (word, cosine), *rest = overlap.nearest("backtracking", 0)
    assert (word, len(rest)) == (model.tokenizer.decode([40]), 4)
    assert cosine == pytest.approx(1.0, abs=1e-5)
    # What points away from a token is near it, with its sign, but does not overlap with it.
    (word, cosine), *_ = overlap.nearest("backtracking", 1)
    assert word == model.tokenizer.decode([41])
    assert cosine == pytest.approx(-1.0, abs=1e-5)
    assert overlap.embedding.maximum[1, 1] < 0.9
    # Without the gain of the final norm the logit's direction is another one.
    bare = torch.nn.functional.cosine_similarity(planted.raw[0, 2], model.W_U[:, 42], dim=0)
    assert bare < 0.99


def test_the_unembedding_direction_raises_its_logit_most(model):
    """The definition, by running it: of all unit directions at the last layer, that of token 42."""
    ids = torch.tensor([[5, 6, 7, 8]])
    direction = torch.nn.functional.normalize(model.W_U[:, 42] * models.final_norm_gain(model), dim=0)

    def rise(added: torch.Tensor) -> float:
        def add(resid, hook):
            return resid + 1e-2 * added

        with torch.no_grad():
            before = model(ids)[0, -1]
            after = model.run_with_hooks(ids, fwd_hooks=[(models.resid_hook(2), add)])[0, -1]
        return float((after - before)[42])

    resid = {}
    with torch.no_grad():
        model.run_with_hooks(
            ids, fwd_hooks=[(models.resid_hook(2), lambda value, hook: resid.update(last=value[0, -1]))]
        )
    # Along the residual itself the norm undoes everything, so directions are compared beside it.
    along = torch.nn.functional.normalize(resid["last"], dim=0)

    def beside(vector: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vector - (vector @ along) * along, dim=0)

    best = rise(beside(direction))
    assert best > 0
    assert best > rise(beside(model.W_U[:, 42])) * 1.001
    generator = torch.Generator().manual_seed(1)
    others = [rise(beside(torch.randn(len(direction), generator=generator))) for _ in range(20)]
    assert best > max(others)


def test_chunks_give_what_one_matrix_gives(model, planted, monkeypatch):
    whole = embedding_overlap(model, planted, k=7)
    monkeypatch.setattr(overlap_module, "MAX_COSINES", 6 * 10)  # ten tokens at a time
    chunked = embedding_overlap(model, planted, k=7)
    units = torch.nn.functional.normalize(planted.raw, dim=-1)
    for side, rows in (("embedding", model.W_E), ("unembedding", model.W_U.T * models.final_norm_gain(model))):
        cosines = units @ torch.nn.functional.normalize(rows, dim=-1).T
        best = cosines.abs().topk(7).indices
        for overlap in (whole, chunked):
            tokens = getattr(overlap, side)
            torch.testing.assert_close(tokens.maximum, cosines.max(-1).values)
            torch.testing.assert_close(tokens.cosines, cosines.gather(-1, best))
            assert tokens.texts[1][2] == tuple(model.tokenizer.decode([i]) for i in tokens.ids[1, 2].tolist())


def test_length_and_scale_do_not_matter_and_zero_overlaps_with_nothing(model, planted):
    longer = dataclasses.replace(planted, raw=planted.raw * 1000)
    torch.testing.assert_close(
        embedding_overlap(model, longer).embedding.maximum, embedding_overlap(model, planted).embedding.maximum
    )
    nothing = embedding_overlap(model, vectors_for(model, torch.zeros_like(planted.raw)))
    assert nothing.embedding.cosines.abs().max() == 0


def test_table_names_tokens_with_signs(model, planted):
    frame = embedding_overlap(model, planted, k=2).to_dataframe()
    assert list(frame.columns) == [
        "behavior",
        "layer",
        "embedding",
        "unembedding",
        "embedding_tokens",
        "unembedding_tokens",
    ]
    row = frame[(frame.behavior == "backtracking") & (frame.layer == 1)].iloc[0]
    assert f"{model.tokenizer.decode([41])!r} (-1.00)" in row.embedding_tokens


def test_the_rule_leaves_out_what_was_left_out_by_eye():
    assert leading_above(PUBLISHED, 1.2) == 3
    assert leading_above(PUBLISHED, 1.3) == 2
    assert leading_above(PUBLISHED, 3.0) == 0
    assert leading_above([0.1, 0.1, 0.9], 1.2) == 0  # a later peak is not leading
    assert leading_above([0.1], 1.2) == 0


def planted_overlap(rows: dict[str, list[float]]) -> EmbeddingOverlap:
    maximum = torch.tensor(list(rows.values()))
    shape = maximum.shape
    texts = tuple(tuple(("x",) for _ in range(shape[1])) for _ in range(shape[0]))
    tokens = NearestTokens(maximum, torch.zeros(*shape, 1, dtype=torch.long), maximum[..., None], texts)
    return EmbeddingOverlap(tuple(rows), tuple(range(shape[1])), tokens, tokens)


def test_leading_layers_are_counted_by_behavior():
    overlap = planted_overlap({"backtracking": PUBLISHED, "adding-knowledge": [0.08] * 32})
    assert overlap.leading_layers() == {"backtracking": 3, "adding-knowledge": 0}
    assert overlap.leading_layers(factor=1.3)["backtracking"] == 2
    with pytest.raises(LensteerError, match=r"factor 0\.0 must be above 0"):
        overlap.leading_layers(0.0)


def test_bad_input_is_refused(model, planted, tiny_checkpoint):
    with pytest.raises(LensteerError, match="k=0 nearest tokens: choose 1 to 32"):
        embedding_overlap(model, planted, k=0)
    other = models.load_model(tiny_checkpoint("qwen3", n_layers=3))
    with pytest.raises(LensteerError, match="do not fit"):
        embedding_overlap(other, planted)
    overlap = embedding_overlap(model, planted)
    for arguments, message in [
        (("doubt", 0), "unknown behavior 'doubt'"),
        (("backtracking", 3), r"no overlap at layer 3: there is one at \[0, 1, 2\]"),
    ]:
        with pytest.raises(LensteerError, match=message):
            overlap.nearest(*arguments)

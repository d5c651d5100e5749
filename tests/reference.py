"""Slow, obvious oracles: each computes in the simplest way what a module of lensteer computes quickly.

Nothing here calls the function that it is the reference for. Imported as `from reference import …`.
"""

from __future__ import annotations

import math

import torch

# --- vectors: one trace at a time, every activation kept ------------------------------------------


def kept_activations(model, trace) -> torch.Tensor:
    """Output of every block at every token of one trace, alone in its batch, `[layer pos d_model]`."""
    ids = torch.tensor([list(trace.ids)])
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, attention_mask=torch.ones_like(ids))
    layers = range(model.cfg.n_layers)
    return torch.stack([cache[f"blocks.{layer}.hook_resid_post"][0] for layer in layers]).double()


def window_positions(span, window: str, n_tokens: int) -> list[int]:
    if window == "onset":
        chosen = [span.start - 1]
    elif window == "span":
        chosen = list(range(span.start - 1, span.end))
    elif window == "published":
        chosen = list(range(span.start - 1, min(span.end - 1, span.start + 10)))
    else:
        side, k = window[len("onset")], int(window[len("onset") + 1 :])
        begin, end = span.start - 1 - (k if side in "±-" else 0), span.start - 1 + (k if side in "±+" else 0)
        chosen = list(range(begin, end + 1))
    return [p for p in chosen if 1 <= p < n_tokens]


def slow_difference(kept, traces, labels, window, negatives, aggregation) -> torch.Tensor:
    """Difference of means by lists of rows, each with the number of its trace, `[behavior layer d_model]`.

    `kept` holds each trace's `kept_activations`.
    """

    def mean(rows):  # of (trace, activation)
        if aggregation != "trace":
            return torch.stack([x for _, x in rows]).mean(0)
        per_trace = [torch.stack([x for u, x in rows if u == t]).mean(0) for t in {t for t, _ in rows}]
        return torch.stack(per_trace).mean(0)

    rows, everything = [], []  # (trace, label, activation) and (trace, activations of all tokens)
    for t, (acts, trace) in enumerate(zip(kept, traces, strict=True)):
        if not trace.spans:
            continue
        for span in trace.spans:
            positions = window_positions(span, window, len(trace.ids))
            if aggregation == "token":
                rows += [(t, span.label, acts[:, p]) for p in positions]
            else:
                rows.append((t, span.label, acts[:, positions].mean(1)))
        begin, end = min(s.start for s in trace.spans), max(s.end for s in trace.spans)
        everything.append((t, acts[:, begin:end]))
    out = []
    for label in labels:
        positive = [(t, x) for t, name, x in rows if name == label]
        if negatives == "all" and aggregation == "token":
            negative = torch.cat([acts for _, acts in everything], dim=1).mean(1)
        elif negatives == "all":
            negative = torch.stack([acts.mean(1) for _, acts in everything]).mean(0)
        elif negatives == "spans":
            negative = mean([(t, x) for t, _, x in rows])
        elif negatives == "rest":
            negative = mean([(t, x) for t, name, x in rows if name != label])
        else:
            own = {t: torch.stack([x for u, _, x in rows if u == t]).mean(0) for t, _ in positive}
            negative = mean([(t, own[t]) for t, _ in positive])
        out.append(mean(positive) - negative)
    return torch.stack(out)


def slow_mean_norm(kept, traces) -> torch.Tensor:
    means = []
    for acts, trace in zip(kept, traces, strict=True):
        if trace.spans:
            begin, end = min(s.start for s in trace.spans), max(s.end for s in trace.spans)
            means.append(acts[:, begin:end].mean(1))
    return torch.stack(means).mean(0).norm(dim=-1)


# --- attribution: one patched forward per cell ----------------------------------------------------


def patched_forward_kl(model, ids, position, layer, added) -> float:
    """KL(p ‖ p′) in nats at `position`, p′ from a full forward with `added` added there to the output of `layer`."""
    tokens = torch.tensor([list(ids)])

    def patch(resid, hook):
        resid = resid.clone()
        resid[0, position] += added
        return resid

    with torch.no_grad():
        plain = model(tokens)[0, position]
        hooks = [(f"blocks.{layer}.hook_resid_post", patch)]
        patched = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, position]
    kl = 0.0
    for log_p, log_q in zip(plain.double().log_softmax(-1), patched.double().log_softmax(-1), strict=True):
        kl += float(log_p.exp() * (log_p - log_q))
    return kl


def patched_span_kl(model, ids, begin, end, layer, added) -> float:
    """Σ KL(p_t ‖ p′_t) over positions [begin, end), with `added` added at all of them to the output of `layer`."""
    tokens = torch.tensor([list(ids)])

    def patch(resid, hook):
        resid = resid.clone()
        for position in range(begin, end):
            resid[0, position] += added
        return resid

    with torch.no_grad():
        plain = model(tokens)[0, begin:end].double().log_softmax(-1)
        hooks = [(f"blocks.{layer}.hook_resid_post", patch)]
        patched = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, begin:end].double().log_softmax(-1)
    return float((plain.exp() * (plain - patched)).sum())


def full_forward_gradients(model, ids, metric) -> torch.Tensor:
    """∂ metric(logits)/∂ resid_post of each block and position, `[layer pos d_model]`, by a full forward and backward.

    `metric` gets the logits of the whole text, `[pos d_vocab]`.
    """
    kept = {}

    def keep(resid, hook):
        layer = int(hook.name.split(".")[1])
        kept[layer] = resid.detach().requires_grad_() if layer == 0 else resid
        return kept[layer]

    hooks = [(f"blocks.{layer}.hook_resid_post", keep) for layer in range(model.cfg.n_layers)]
    with torch.enable_grad():
        logits = model.run_with_hooks(torch.tensor([list(ids)]), fwd_hooks=hooks)[0]
        gradients = torch.autograd.grad(metric(logits), [kept[layer] for layer in range(model.cfg.n_layers)])
    return torch.stack([gradient[0] for gradient in gradients])


# --- pairs: one text at a time, every activation kept ---------------------------------------------


def slow_pair_differences(model, pairs) -> torch.Tensor:
    """Positive less negative of every pair, `[pair layer d_model]`; a side is (ids, positions that are averaged)."""
    out = []
    for pair in pairs:
        means = []
        for ids, positions in pair:
            tokens = torch.tensor([list(ids)])
            with torch.no_grad():
                _, cache = model.run_with_cache(tokens, attention_mask=torch.ones_like(tokens))
            layers = [cache[f"blocks.{layer}.hook_resid_post"][0] for layer in range(model.cfg.n_layers)]
            means.append(torch.stack(layers)[:, list(positions)].double().mean(1))
        out.append(means[0] - means[1])
    return torch.stack(out)


def slow_principal_component(differences) -> torch.Tensor:
    """The PCA of both sides of pairs about each pair's own center, oriented and scaled by the mean difference."""
    sides = torch.cat([differences / 2, -differences / 2])
    normal = torch.linalg.svd(sides - sides.mean(0)).Vh[0]
    return normal * (normal @ differences.mean(0))


# --- steering: one number of the residual stream at a time -------------------------------------------


def edited(resid, plans, context, layer: int) -> torch.Tensor:
    """What plans do to a layer's residual stream, number by number: the equations of `steering.operators`, in fp64.

    `resid` is that of the last positions of the context; `plans` has a plan or None for each row.
    """
    out = resid.double().clone()
    skipped = context.ids.shape[1] - resid.shape[1]
    for row, plan in enumerate(plans):
        for edit in () if plan is None else plan.edits:
            if edit.layer != layer:
                continue
            chosen, raw = edit.scope.mask(context)[row], edit.direction.at(layer).double()
            unit, vector = raw / raw.norm(), edit.vector.double()
            for at in range(resid.shape[1]):
                h, since = out[row, at], int(skipped + at - context.pad[row] - context.prompt_length[row])
                if not chosen[skipped + at] or not gate_opens(edit.gate, h, unit):
                    continue
                c = edit.coefficient * schedule_factor(edit.schedule, max(0, since))
                if edit.operator == "add":
                    new = h + c * vector
                elif edit.operator == "project_out":
                    new = h - c * (h @ unit) * unit
                elif edit.operator == "clamp":
                    new = h + (c * vector.norm() - h @ unit) * unit
                else:
                    cosine = float(h @ unit / h.norm())
                    across = h - (h @ unit) * unit
                    angle = min(max(math.acos(max(-1, min(1, cosine))) - math.radians(c), 0), math.pi)
                    new = h.norm() * (math.cos(angle) * unit + math.sin(angle) * across / across.norm())
                out[row, at] = new
    return out


def gate_opens(gate, h, own) -> bool:
    if gate is None:
        return True
    along = own if gate.direction is None else gate.direction.double() / gate.direction.double().norm()
    value = float(h @ along) / (float(h.norm()) if gate.measure == "cosine" else 1.0)
    return value > gate.threshold if gate.above else value < gate.threshold


def schedule_factor(schedule, t: int) -> float:
    if schedule is None:
        return 1.0
    left = 0.5 ** (t / schedule.tokens) if schedule.shape == "half_life" else max(0.0, 1 - t / schedule.tokens)
    return float(schedule.end + (1 - schedule.end) * left)


# --- constructions that divide by a covariance ----------------------------------------------------


def slow_shrunk_covariance(rows, weights) -> torch.Tensor:
    """Ledoit and Wolf's estimate of Σ ω x xᵀ, shrunk after standardization; rows are centered, ω sums to 1."""
    n, width = rows.shape
    sigma = torch.stack([sum(w * x[j] ** 2 for w, x in zip(weights, rows, strict=True)) for j in range(width)]).sqrt()
    scaled = [(n * w).sqrt() * x / sigma for w, x in zip(weights, rows, strict=True)]
    sample = sum(torch.outer(y, y) for y in scaled) / n
    target = torch.eye(width, dtype=torch.float64) * sample.diagonal().mean()
    noise = sum((torch.outer(y, y) - sample).square().sum() for y in scaled) / n**2
    off = (sample - target).square().sum()
    shrunk = sample + min(noise, off) / off * (target - sample)
    return torch.outer(sigma, sigma) * shrunk


def slow_discriminant(rows, labels, behavior, weights=None) -> torch.Tensor:
    """Fisher's discriminant of one label against all others, projected on: n̂ ⟨n̂, mean − mean of the others⟩."""
    weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights

    def mean(chosen):
        return sum(weights[i] * rows[i] for i in chosen) / sum(weights[i] for i in chosen)

    groups = {b: [i for i, label in enumerate(labels) if label == b] for b in labels}
    centered = torch.stack([rows[i] - mean(groups[label]) for i, label in enumerate(labels)])
    gap = mean(groups[behavior]) - mean([i for i, label in enumerate(labels) if label != behavior])
    normal = torch.linalg.inv(slow_shrunk_covariance(centered, weights / weights.sum())) @ gap
    normal = normal / normal.norm()
    return normal * (normal @ gap)

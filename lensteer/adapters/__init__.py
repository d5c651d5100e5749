"""A steered model as other harnesses ask it: lm-evaluation-harness (`lm_eval`), inspect_ai (`inspect_ai`).

Both are thin: `requests` runs what they ask for through lensteer's own generation and forward. Each needs its package,
which the extras `lm-eval` and `inspect` install, so nothing here is imported by `import lensteer`.
"""

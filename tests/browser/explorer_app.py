"""The explorer in marimo, on few chains."""

import marimo

app = marimo.App()


@app.cell
def _():
    import marimo as mo

    import lensteer as ls

    model = ls.load_model()
    traces = ls.annotate(ls.generate_traces(model, ls.load_tasks(split="train", n=12), temperature=1.0), ls.grammar)
    vectors = ls.fit_vectors(model, traces, window="onset")
    mo.ui.anywidget(ls.explore(model, vectors, traces))


if __name__ == "__main__":
    app.run()

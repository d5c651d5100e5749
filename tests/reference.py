"""Slow, obvious oracles: each computes by the plainest means what a module of lensteer computes quickly.

Nothing here calls the function that it is the reference for. Imported as `from reference import …`.
"""

"""How a prompt asks for a behavior in plain English: the baseline that steering has to be held against."""

WORDS: dict[str, str] = {
    "adding-knowledge": "While you think, recall every fact, definition or rule that may help, and state it.",
    "example-testing": "While you think, try concrete examples and special cases before you trust a conclusion.",
    "uncertainty-estimation": "While you think, say openly wherever you are not sure, and how sure you are.",
    "backtracking": "While you think, give up an approach and try another one whenever you have a doubt about it.",
}
"""Behavior to a sentence that is appended to the question. The organism has words of its own (`organism.cue`)."""

"""Finds training text that repeats evaluation text: a bench enters; findings, then a clean bench leave.

ngrams.py, index.py          texts as hashes of n-grams; which evaluation row holds which
search.py                    what every training file shares with them
report.py, removal.py        a report with decisions to change; the bench without what they remove
"""

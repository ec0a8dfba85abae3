"""Which document lies where in which row, for a whole run: a corpus and a mixture enter, a plan leaves.

mixture.py, shares.py        how often every task is drawn
draws.py, shuffle.py         which of its documents then
prefixes.py, packing.py      documents that begin alike; documents into rows
balance.py                   rows that cost alike in groups
build.py, writer.py          window after window, in processes; the folder, whole or absent
folder.py, validation.py     the plan opened; checked against its corpus
"""

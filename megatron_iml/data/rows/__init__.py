"""Rows as a model takes them: documents, or a corpus with its plan, enter; a `Row` leaves.

layout.py                    positions and `end`, the mask: one int32 for each slot
assemble.py                  tokens and targets
loader.py                    row n of a plan
"""

"""Checkpoints: those of a run, written and read by all ranks, and weights in other people's formats.

    where a save begins and ends           store.py; the process that writes, background.py
    how a GPU's state gets to the host     staging.py
    what a rank saves, and as what         sharded.py
    what is complete, and what is in it    record.py
    which ones stay                        retention.py
    going on, under any layout             load.py
    weights alone, from any format         weights.py
    another precision                      rewrite.py
    Hugging Face and metaseq               conversion/

Nothing here knows how training works but what it holds: an Engine enters, and its state leaves or comes back.
"""

"""From benchmark files to rows of token ids: a sub-package for each hop; numpy and tokenizers only, no torch.

    benchmark files -sources, taxonomy-> tasks -bench-> bench/ -corpus-> corpus/ -plan-> plan/ -rows-> Row

    where a source is read       sources/<format>.py; registry.py names them all
    the category of a task       taxonomy/categories.yaml
    the split of an example      bench/splits.py, and the level of its task bench/levels.py
    the prompt                   bench/prompts.py
    training text that leaks     contamination/search.py
    the tokeniser                corpus/tokenizer.py, source and target as ids corpus/encoding.py
    how often a task is drawn    plan/mixture.py, plan/shares.py
    the packing                  plan/packing.py
    the mask's `end`             rows/layout.py

Here lies what they share: the types `Task` and `Example`, the ledger, files as they are found (text_files.py,
tables.py) and as they are written (files.py, manifest.py, jobs.py, progress.py).
"""

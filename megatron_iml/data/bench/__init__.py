"""The bench, all benchmarks in one form: tasks and a splits file enter, a bench folder leaves.

config.py                    a bench config: which sources, which splits
levels.py, splits.py         what is held out: the level of a task, the split of an example
prompts.py                   source and targets as `src` and `tgt`
writer.py, staging.py        the folder, whole or absent
folder.py, chunks.py         the folder read: row by row, or a few MiB at a time
demonstrations.py            a k-shot bench from a zero-shot one
"""

"""Text to token ids on disk: one split of a bench enters, a corpus of memory-mapped shards leaves.

tokenizer.py, encoding.py    text to ids; an example as one source and its target sequences
build.py, workers.py         shard after shard, in processes and jobs
format.py, folder.py         Megatron's .bin and .idx; the corpus opened
validation.py                a corpus checked from end to end
"""

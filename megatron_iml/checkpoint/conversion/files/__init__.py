"""Files of tensors, read in place or written into gaps; nothing here knows a model.

stored_tensor.py     a tensor where it lies in a mapped file; safetensors
torch_archive.py     what `torch.save` wrote, without running it
plan.py              a file's fixed bytes and gaps, before a tensor is there
"""

"""OPT on megatron-core: embedding, layers with document attention, LM head on target rows."""

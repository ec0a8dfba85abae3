"""Process groups, rows dealt to ranks, and the CPU as a real device of megatron-core."""

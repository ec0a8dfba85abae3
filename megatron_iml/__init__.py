"""megatron-iml: from instruction benchmarks to an instruction-tuned OPT. Importing this imports nothing."""

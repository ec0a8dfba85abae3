"""Training: one step, the loop around it, its schedule, its self-test and what it reports."""

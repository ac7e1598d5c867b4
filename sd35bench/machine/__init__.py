"""The machine that is measured on: clocks, memory, rates, and what else ran on it meanwhile."""

"""Time and memory of a meta-step on one machine.

compare.py: the comparison, its table and its records.
charts.py: the pictures of a comparison.
long_run.py: memory and speed over thousands of meta-steps.
threads.py: throughput of calls from several threads.
measure.py: the three measurements: agreement of gradients, times, peak memory.
processes.py: a measurement or a contender in a process of its own.
arguments.py: the flags that `compare` and `gpu` share.
machine.py: allocator, threads, memory, versions.
"""

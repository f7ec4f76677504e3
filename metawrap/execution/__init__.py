"""How calls and tasks are run; this changes their time and memory, never their result. Top to bottom:

measured.py: the fastest way, measured on a learner's own batch
parallel.py: tasks in threads, in forked processes or by replays
calls.py: which calls of a learner may run at the same time, and on which modules
executor.py: tasks in their order, fewer at once where memory runs out
ranks.py: processes of torch.distributed that share a meta-step
threads.py: replicas of a learner, and tasks in threads
staying_processes.py: forked processes that stay from one meta-step to the next
forked_processes.py: tasks in forked processes
messages.py: values sent from one process to another
cuda_graphs.py: a meta-gradient recorded once and replayed
tuning.py: a way to run tasks, and the search for the fastest
out_of_memory.py: the answer to a lack of memory
allocator.py: the C library's allocator keeps freed memory
"""

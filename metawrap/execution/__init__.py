"""How the tasks of a batch are run: in order, in threads, in forked processes, over ranks, by CUDA graphs."""

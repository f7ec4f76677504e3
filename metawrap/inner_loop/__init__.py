"""The data path of gradient-based methods: task -> fast weights -> target loss after each inner step. Top to bottom:

task_solver.py: from tasks to outcomes; chooses the way through the files below
flat_memory.py: the path with the graph of one inner step at a time
class_starts.py: the head starts from one row for all classes, or from their prototypes; the table of all starts
head_starts.py: where the head starts in each task
inner_loop.py: the path: the one generator over inner steps, target losses, weighted sum
update_rules.py: SGD, momentum, Adam, clipping; the learned rates
masking.py: outputs of classes that a task lacks
task_layout.py: which tasks share a stack; images in channels_last
padding.py: tasks of unequal sizes as one stack
"""

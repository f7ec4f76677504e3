"""Questions that are asked before anything is changed. Top to bottom:

first_task.py: what a gradient-based learner asks of its model when it meets the first task
not_finite.py: the task, inner step and layer where numbers stop being finite
task_batches.py: labels that a loss cannot take, inputs that a model cannot take
unequal_tasks.py: whether tasks of unequal sizes may be padded
first_look.py: findings of the first task, and the checks of a single pass
several_tasks.py: whether a model can run several tasks at once
second_derivative.py: whether a model can be differentiated twice
"""

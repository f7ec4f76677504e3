"""Layers that know the inner step, and layers with fast second derivatives. Top to bottom:

per_step_norm.py: batch norm with rows per inner step; the inner-step clock
task_norm.py: TaskNorm, and the norms that are deployed with it
support_moments.py: moments of a support set that normalise targets, and the shifts of targets against them
quick_forms.py: batch norm, convolution and pooling with fast second derivatives
norm_policies.py: which statistics normalise which pass of a task
learned_update.py: the update rule of the LSTM meta-learner
"""

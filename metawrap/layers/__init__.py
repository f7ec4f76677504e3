"""Layers that know the inner step, and layers with fast second derivatives. Top to bottom:

per_step_norm.py: batch norm with rows per inner step
task_norm.py: TaskNorm, and the norms that are deployed with it
norm_of_pooled.py: max-pooling that runs before the batch norm and the ReLU in front of it, for speed
quick_forms.py: convolution and pooling with fast second derivatives
moments.py: moments of a batch, batch norm by them with fast derivatives, and the shifts of targets
step_clock.py: the inner step of a pass, and what norms record in it
norm_policies.py: which statistics normalise which pass of a task
learned_update.py: the update rule of the LSTM meta-learner
"""

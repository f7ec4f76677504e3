"""The face of every learner: meta_step, forward, adapt, evaluate, unwrap, describe. Top to bottom:

joint_training.py: supervised training on all tasks, then gradient steps on a new one (FineTune, MultiTask)
head_learner.py: base of the methods that fit the user's own head (ANIL, FineTune, MultiTask)
embedding_learner.py: base of the methods that fit a head to embeddings (ProtoNet, R2D2, ...)
learner.py: base of all methods, with the public face
evaluation.py: eval mode for a while: `evaluate`, and the frame of `adapt`
metrics.py: what `evaluate` measures
task_classes.py: the classes of one task, for `adapt`
loading.py: loading a state_dict wholly or not at all
describing.py: from a learner to its description
description.py: the facts of a description
description_page.py: a description as terminal text and HTML
without_inner_loop.py: construction and checks of learners without an inner loop
keywords.py: keywords of constructors, for type checkers and editors
"""

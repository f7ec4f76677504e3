"""Heads that are fitted to a support set, and the embedding that enters them. Top to bottom:

placed_head.py: a fitted head in the place of the user's own, and its pickle
own_head.py: the user's own head, fitted in its place by gradient steps
embedding.py: the tensor that enters the head
joint_rows.py: support and target as one batch, and trials of whether rows are examples
class_rows.py: learned rows, one for each class of a task
class_table.py: a weight vector for each class of all tasks, or a head for each task
centre.py: the mean support embedding of the training tasks, and their spread within classes
fitted.py: prototypes, linear heads, and their arithmetic
softmax_regression.py: softmax regression as a differentiable function
multiclass_svm.py: the multi-class SVM as a differentiable function
"""

"""The contenders of every comparison, behind one interface, and the meta-step that all of them do.

contenders.py: all contenders by name, metawrap's settings among them.
libraries.py: the meta-step through higher, TorchOpt, learn2learn, iteryne, parallel-metalearn and JAX.
plain.py: the meta-step in plain torch, the reference of every ratio.
cases.py: task shapes, images and initial values, the same for all.
"""

"""A meta-step on a GPU.

meta_step.py: seconds and kernels of each setting, and its percent of the device's ceilings.
"""

"""Keywords of learners: one declaration of default, bound and help text for each. Top to bottom:

settings.py: presets, and every setting of a learner
keywords.py: names of keywords, and the nearest one to a wrong name
groups.py: the five groups of keywords that no paper names
validated.py: frozen dataclasses that check types and bounds
schedules.py: weights of step losses, derivative order and outer rate by epoch
"""

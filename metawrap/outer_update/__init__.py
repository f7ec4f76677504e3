"""The outer update:

outer_update.py: optimizer, schedules, clipping, skipped steps
users_scheduler.py: the user's own scheduler, in the learner's state and back
"""

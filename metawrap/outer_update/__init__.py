"""The outer update:

outer_update.py: optimizer, schedules, clipping, skipped steps
"""

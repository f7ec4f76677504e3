"""Looks into the user's module, and changes a copy of it: never the module itself."""

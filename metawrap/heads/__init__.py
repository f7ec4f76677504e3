"""Heads that are fitted to a support set: closed-form, prototypes, tables of classes."""

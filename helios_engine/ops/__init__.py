"""Operators on plain tensors; nothing here knows of modules, ranks or schedules."""

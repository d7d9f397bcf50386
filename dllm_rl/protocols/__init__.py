"""The contracts between the parts, one a file. Docstrings are binding.

Every plugin class has a nested frozen dataclass ``Config`` (its options, all with defaults unless there is no sensible
one) and takes one instance of it: ``Plugin(config)``. A Config raises ValueError in ``__post_init__`` for values out
of range.
"""

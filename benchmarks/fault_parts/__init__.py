"""Parts of ``benchmarks/faults.py``, one kind of fault a module."""

"""Parts of ``benchmarks/faults.py``: a module for each kind of fault."""

"""Where records rest: one module per backend, all under the agreement in `abc.py`."""

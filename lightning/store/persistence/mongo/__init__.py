"""MongoDB as a backend. It needs pymongo, which only those who use it install: nothing here is imported before."""

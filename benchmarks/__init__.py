"""`scripts/bench`: how fast this project is, beside its peer and beside what the transport alone can do.

A part measures some rows and returns a `Section`; `report` writes what was measured to `docs/benchmarks.md`. Whatever
is compared is measured in the same run, alternating, so that a machine that slows down slows all of it down.
"""

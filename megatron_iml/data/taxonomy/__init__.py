"""Names tasks: a benchmark's own labels enter, one of our categories and its data sources leave.

`categories.yaml` is the table; `data_sources.py` knows one name for each original data set.
"""

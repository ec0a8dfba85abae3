"""Reads benchmarks: folders in their official formats enter, `Task`s with their `Example`s leave.

One module for each format (`registry.py` names them), and what several share: `form.py`, `instructions.py`,
`jinja_templates.py`, `reasoning_form.py`, `reasoning_joined.py`. No prompt delimiter, no category of ours and
no split is known yet.
"""

"""Formats that are read: each checks that every tensor is there and right, then gives them one by one."""

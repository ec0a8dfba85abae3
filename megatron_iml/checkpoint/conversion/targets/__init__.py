"""Formats that are written: each lays out its files and says where a tensor goes."""

"""Weights in one format, read tensor by tensor, become weights in another.

    folder -formats-> Source -convert-> Target -partial-> folder

parameter_map.py             every tensor's name in each format, and the rules that split and merge
source.py, target.py         what a format must offer to be read, and to be written
sources/, targets/           Hugging Face, metaseq, native
formats.py                   which of them a folder is
convert.py                   from one to the other
partial.py                   the folder in the making, which a kill cannot spoil
manifest.py                  where weights came from, and checksums
verification.py              the same logits, compared without parameter_map.py
files/                       safetensors and torch archives: mapped, and laid out before they are filled
"""

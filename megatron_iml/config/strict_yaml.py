"""YAML in which a key given twice is an error; PyYAML alone keeps the last one and says nothing.

parse_yaml("seed: 1")           ->  {"seed": 1}
parse_yaml("seed: 1\\nseed: 2")  ->  ValueError: line 2: got the key seed twice; ...
"""

from collections.abc import Hashable
from typing import Any

import yaml


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """PyYAML's mapping, after a look at its keys."""
        seen: set[str] = set()
        # Before super(), which adds to node.value what `<<` merges: such a key may be given again on purpose.
        for key_node, _ in node.value:
            # A list or a mapping as a key is for PyYAML to refuse; here it could not be looked up.
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(
                    f"line {line}: got the key {key_node.value} twice; allowed: once; remove one"
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> object:
    """Plain values of a YAML text. Raises ValueError for text that is not YAML and for repeated keys."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        # PyYAML spreads its reason over several lines; an error here is one.
        reason = " ".join(str(error).split())
        raise ValueError(f"got text that is not YAML; allowed: YAML; mend it: {reason}") from error

"""Bounds that keep a spec from a stranger from taking the machine down. Each one answers with a finding.

The numbers are far above anything a real model needs and far below anything that hurts.
"""

__all__ = [
    "MAX_ALIASES",
    "MAX_FILE_BYTES",
    "MAX_INTEGER",
    "MAX_LIST",
    "MAX_LOOP",
    "MAX_NESTING",
    "MAX_NODES",
    "MAX_SPEC_VALUES",
]

MAX_FILE_BYTES = 1_000_000  # a spec or a block file; the largest shipped one has under 10 kB
MAX_NESTING = 40  # brackets in an expression, levels of YAML, blocks inside blocks
MAX_ALIASES = 100  # uses of `*anchor` in one spec
MAX_SPEC_VALUES = 20_000  # scalars, lists and maps of one spec, aliases expanded
MAX_INTEGER = 10**18  # magnitude of any number in an expression; fits a 64-bit size
MAX_LIST = 10_000  # entries of a list value
MAX_LOOP = 10_000  # rounds of one compile-time loop, blocks of one stage
MAX_NODES = 1_000_000  # primitive ops of an elaborated model

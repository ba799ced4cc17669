"""Bounds that keep a spec from a stranger from taking the machine down. Each one answers with a finding.

The numbers are far above anything a real model needs and far below anything that hurts.
"""

__all__ = [
    "MAX_ALIASES",
    "MAX_DEPTH",
    "MAX_FILE_BYTES",
    "MAX_INTEGER",
    "MAX_LIST",
    "MAX_LOOP",
    "MAX_NESTING",
    "MAX_NODES",
    "MAX_PLACEHOLDERS",
    "MAX_ROWS",
    "MAX_SPEC_VALUES",
    "MAX_STAGES",
    "MAX_STEPS",
    "MAX_TOKENS",
]

MAX_FILE_BYTES = 200_000  # a spec or a block file; the largest shipped one has under 10 kB
MAX_TOKENS = 40_000  # words, numbers and signs of a block file; the largest shipped one has some 600
MAX_NESTING = 40  # brackets in an expression, levels of YAML, blocks inside blocks, specs that extend specs
MAX_DEPTH = 200  # levels of a syntax tree: each term of a sum lies one deeper than the next
MAX_ALIASES = 100  # uses of `*anchor` in one spec
MAX_SPEC_VALUES = 5_000  # scalars, lists and maps of one spec, aliases expanded; the largest shipped one has some 200
MAX_INTEGER = 10**18  # magnitude of any number in an expression; fits a 64-bit size
MAX_LIST = 10_000  # entries of a list value
MAX_LOOP = 10_000  # rounds of one compile-time loop, blocks of a model
MAX_STAGES = 1_000  # stages of a model
MAX_ROWS = 100  # rows of `published` and of `exact`
MAX_STEPS = 30_000  # statements run and ops placed while a model is elaborated; sharing keeps real ones below 1000
MAX_PLACEHOLDERS = 10  # of one key of a layout; shipped ones have at most three
MAX_NODES = 1_000_000  # primitive ops of an elaborated model, spelled out

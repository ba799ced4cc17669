"""Graphs and definitions to PyTorch source.

`formulas` knows sizes that are not numbers yet, `classes` writes one class per block definition, `program` the file
around them: imports, classes, the model, its initialisation.
"""

from tokenmix.compiler.emit.program import emit

__all__ = ["emit"]

"""Naive PyTorch references that the test suite treats as the truth; nothing here imports tokenmix."""

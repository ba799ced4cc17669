import torch

# Thousands of small double-precision operations: threads wait for each other longer than they compute.
torch.set_num_threads(1)

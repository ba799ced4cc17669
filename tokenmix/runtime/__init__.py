"""What needs torch: emitted modules built, audited and run on images."""

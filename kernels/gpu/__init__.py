"""LSTM kernels in Triton. Importing a module of this package needs Triton; importing the package itself does not."""

"""LSTM kernels and the plain equations that they are checked against."""

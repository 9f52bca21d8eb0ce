"""The LSTM kernel for CPUs: C++ that is compiled for the machine at hand when it is first used."""

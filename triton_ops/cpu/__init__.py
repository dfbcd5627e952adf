"""The compiled CPU path: a C++ source, its build on first use, and the call through ctypes."""

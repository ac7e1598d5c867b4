"""The CPU path: C++ compiled once on the machine that runs it, called through ctypes."""

"""The CPU path: C++ generated from a site's specification, built once, called through ctypes."""

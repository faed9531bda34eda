"""A reference ML platform: what its notebooks, its commands and its tests share.

Importing this package, or any module of it, starts nothing and reads no environment.
"""

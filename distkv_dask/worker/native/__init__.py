"""The exchange of a layer in C++, at both ends, and the structures that Python lays out for it.

May import: `channels` for frames, the kernels' layouts.
May not touch: Python objects, in C++.
"""

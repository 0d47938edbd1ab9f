"""The exchange of a layer in C++, at both ends, and the structures that Python prepares for it.

May import: `channels` for frames, `kernels` for layouts.
May not touch: Python objects, in C++.
"""

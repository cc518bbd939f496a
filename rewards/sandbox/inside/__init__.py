"""What runs on the far side of the wall: the zygote, the box's first process, and the harness around a program.

Left out: anything secret, and anything from outside the standard library. These modules are loaded by a bare
interpreter (no site packages) that never sees the rest of the project, so they import only each other.
"""

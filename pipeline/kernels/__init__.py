"""What an exported model computes faster on a CPU than torch's operators do: integers, and few passes.

Nothing here decides anything: each kernel computes what the module beside it in another room does, and where it cannot
be had (`compiler.py`) that is what runs. Any room below may import from here.
"""

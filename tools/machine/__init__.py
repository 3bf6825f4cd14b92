"""What `tools/vm` is made of: Debian's kernels and packages, the guest's files, the machine that is emulated."""

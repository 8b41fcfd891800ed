"""Operations with kernels of their own: one file per operation, and one per kind of hardware."""

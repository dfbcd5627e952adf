"""The Triton kernels: the backend's door, one file per regime, and how they are launched."""

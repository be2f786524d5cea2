"""One op a file: its plain reference (any dtype), its fast PyTorch path and its kernels. `idefics2_fast.ops` chooses among them."""

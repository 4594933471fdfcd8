"""What concerns TensorRT: which layers its sparse kernels can run, engines and their files."""

"""What training and long prompts spend their time in, compiled for the CPU at first use (`kernels.cpp`)."""

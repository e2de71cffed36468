"""What training and long prompts spend their time in beside matrix products, compiled for the CPU at first use."""

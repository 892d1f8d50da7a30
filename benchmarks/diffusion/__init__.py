"""Steps and pictures of reduced diffusion networks: UNets and joint transformers."""

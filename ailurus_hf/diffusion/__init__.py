"""Token reduction in diffusers' UNets, ControlNets and patch transformers."""

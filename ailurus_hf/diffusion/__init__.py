"""Token reduction in diffusers' UNets, ControlNets and transformers."""

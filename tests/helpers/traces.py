"""What switching a method on may leave on a model, to be compared before and after."""


def traces(model):
    """Everything that a hook or a patch could leave: attributes, hooks, configs, attention functions and processors."""
    hooks = [
        (name, sorted(vars(module)), [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks") and v])
        for name, module in model.named_modules()
    ]
    config = getattr(model, "config", {})
    configs = [config.to_dict() if hasattr(config, "to_dict") else dict(config)]
    attention = [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")]
    processors = {name: type(processor) for name, processor in getattr(model, "attn_processors", {}).items()}
    return hooks, configs, attention, processors

"""Diffusers pipelines. Their sources are in ailurus_hf/pipelines/; the files here hand them on to `custom_pipeline`."""

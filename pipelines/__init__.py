"""Diffusers pipelines, one readable file each; none yet.

Import them as `ailurus_hf.pipelines`: these sources are part of the package, kept at the top for reading.
"""

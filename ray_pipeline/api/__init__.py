"""The functions of the public Python API; `ray_pipeline` has their names."""

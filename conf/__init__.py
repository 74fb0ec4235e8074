"""The Hydra tree, `pkg://batchmix.conf`; Hydra finds a package only by its `__init__.py`."""

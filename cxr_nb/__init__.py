"""Generative modelling of chest radiographs, one module a notebook of `nbs/`. Begin with `cxr_nb.data.phantom.open_dataset` and `cxr_nb.core.Run`."""
__version__ = "0.1.0"

"""Training of the models: data, Lightning modules, the loop that resumes exactly, and figures of quality.

Needs the packages of `vqkernels[train]`, but for the configurations and the reading of checkpoints.
"""

"""Use of a trained network: load it, and classify images with it."""

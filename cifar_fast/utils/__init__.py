"""Helpers without a model: errors, files, logging, seeds, devices, torch's global settings, ranks."""

"""Layers and layer inputs that visit the device: slots, schedule, copies. May import data and below."""

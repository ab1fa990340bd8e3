"""What visits the device: layer inputs kept on the host between forward and backward. May import data and below."""

"""What stands in the slot of an attention module: the swapped attention, or what records it in calibration."""

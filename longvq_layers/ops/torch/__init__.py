"""The linear-time backend in plain PyTorch: any device, any floating dtype, any length."""

"""Pretrained networks: image features by name, LPIPS, REPA's teachers."""

"""Pretrained networks: Inception, EfficientNet, REPA's teachers."""

"""Prepare chest CT for training and prediction."""

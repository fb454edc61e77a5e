"""Trained models for others: on the hub with a card, and as folders that diffusers opens without this package."""

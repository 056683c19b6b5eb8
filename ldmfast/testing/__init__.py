"""Scenes with captions, and a judge that reads them back from pixels: how the shipped model's quality is measured."""

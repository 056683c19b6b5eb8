"""Captioned scenes, and a judge that reads them back from pixels: how a model's quality is measured."""

"""Attention variants on equal terms: `bmjax compare`."""

"""The published study on one page: its parts, each a folder of runs, as tables and pictures."""
